"""The random numbers of ranks: different ones in a training step, equal ones outside of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def draw_seed() -> int:
    """Return a number that the CPU's generator draws, which is equal on all ranks."""
    return int(torch.randint(2**62, (), device="cpu"))


@contextmanager
def own_draws(rank: int, device: torch.device) -> Iterator[None]:
    """Let this rank draw other numbers than the others inside, on the CPU and on its device."""
    seed = draw_seed() + rank
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed(seed)
        yield
