"""Keeps the memory that tensors on the host have freed, so that the next step can use it again.

glibc returns large blocks to the kernel when they are freed. Every step then gets its activations and gradients as new
pages, which the kernel fills with zeros at their first use: 4 to 20 % of a step's time on two CPU ranks
(docs/results/layer.md).
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
NEVER = 2**31 - 1  # bytes; a C int


def keep_freed_memory() -> bool:
    """Let malloc keep all freed memory for later use. Return False where this C library cannot do it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    return mallopt is not None and all(mallopt(key, NEVER) == 1 for key in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
