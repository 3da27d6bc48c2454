"""A rank's random generators as tensors, which a checkpoint can hold: torch's, Python's and NumPy's.

This library draws from torch alone; a user's own transforms may draw from the others.
"""

from __future__ import annotations

import random
import struct

import numpy as np
import torch
from torch import Tensor


def rng_states() -> dict[str, Tensor]:
    """The host's, Python's, NumPy's legacy one, and the GPU's where there is one; of the same shapes always."""
    states = {"host": torch.get_rng_state(), "python": _of_python(), "numpy": _of_numpy()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["host"])
    if "python" in states:
        *words, has_gauss, gauss = states["python"].tolist()
        random.setstate((3, tuple(words), _float(gauss) if has_gauss else None))
    if "numpy" in states:
        *key, position, has_gauss, gauss = states["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(key, np.uint32), position, has_gauss, _float(gauss)))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _of_python() -> Tensor:
    """624 words and the position, then the second half of a drawn pair of normals: is there one, its bits."""
    version, words, gauss = random.getstate()
    assert version == 3, "Python's since 3.2"
    return torch.tensor([*words, gauss is not None, _bits(gauss or 0.0)], dtype=torch.int64)


def _of_numpy() -> Tensor:
    """As Python's."""
    kind, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert kind == "MT19937", "np.random.seed has no other"
    return torch.tensor([*np.asarray(key).tolist(), position, has_gauss, _bits(float(gauss))], dtype=torch.int64)


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
