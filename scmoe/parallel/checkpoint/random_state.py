"""Turns the states of a rank's random generators into tensors, which a checkpoint can hold, and back.

This library draws from torch alone; a user's own transforms may draw from Python's and NumPy's generators.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def rng_states() -> dict[str, Tensor]:
    """Return the states of torch (CPU, and GPU if one is in use), of Python and of NumPy's legacy generator."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    assert (version, kind) == (3, "MT19937"), "both generators are Mersenne twisters"
    states = {
        "host": torch.get_rng_state(),
        "python": _pack(words, gauss),
        "numpy": _pack([*np.asarray(key).tolist(), int(position)], float(numpy_gauss) if has_gauss else None),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["host"])
    if "python" in states:
        words, gauss = _unpack(states["python"])
        random.setstate((3, tuple(words), gauss))
    if "numpy" in states:
        (*key, position), gauss = _unpack(states["numpy"])
        np.random.set_state(("MT19937", np.array(key, np.uint32), position, int(gauss is not None), gauss or 0.0))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _pack(words: Sequence[int], gauss: float | None) -> Tensor:
    """Return 624 words and the position, whether the second of a pair of normals is left over, and that one's bits."""
    bits = torch.tensor(gauss or 0.0, dtype=torch.float64).view(torch.int64)
    return torch.tensor([*words, gauss is not None, bits.item()], dtype=torch.int64)


def _unpack(state: Tensor) -> tuple[list[int], float | None]:
    *words, has_gauss = state[:-1].tolist()
    return words, state[-1:].view(torch.float64).item() if has_gauss else None
