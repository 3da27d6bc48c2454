"""Turns the states of a rank's random generators into tensors, which a checkpoint can hold, and back.

This library draws from torch alone; a user's own transforms may draw from Python's and NumPy's generators.
"""

from __future__ import annotations

import random
import struct

import numpy as np
import torch
from torch import Tensor


def rng_states() -> dict[str, Tensor]:
    """Return the states of torch (CPU, and GPU if one is in use), of Python and of NumPy's legacy generator."""
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
    """Return 624 words and the position, then whether the second of a pair of normals is left over, and its bits."""
    version, words, gauss = random.getstate()
    assert version == 3, "Python's since 3.2"
    return torch.tensor([*words, gauss is not None, _bits(gauss or 0.0)], dtype=torch.int64)


def _of_numpy() -> Tensor:
    """Return the same of NumPy as `_of_python` of Python."""
    kind, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert kind == "MT19937", "np.random.seed has no other"
    return torch.tensor([*np.asarray(key).tolist(), position, has_gauss, _bits(float(gauss))], dtype=torch.int64)


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]
