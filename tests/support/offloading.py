"""This module makes models with stores of their experts, and a source of experts that is as late as
it may be."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from scmoe.inference.offload.cache import FileReader
from scmoe.inference.offload.store import Key, Store, write_store
from tests.support.architectures import overrides
from tests.support.models import tiny, tiny_model

DROPLESS = "moe.capacity_factor=null"


def stored(
    words: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[nn.Module, Path]:
    """Return a model in evaluation mode and its store. words: as in
    tests/support/architectures.py."""
    model = tiny_model(tiny("model.layers=6", DROPLESS, *overrides(words)), dtype, seed).eval()
    path = folder / f"{seed}.safetensors"
    write_store(path, model)
    return model, path


class Late:
    """A source that copies an expert only when that one, or one that was started later, is waited
    for."""

    def __init__(self, store: Store) -> None:
        self.store, self.queue = store, list[tuple[Key, Tensor | None]]()  # None: it has arrived

    def start(self, key: Key, slot: Tensor) -> Callable[[], None]:
        self.queue.append((key, slot))
        return partial(self.wait, len(self.queue))

    def wait(self, number: int) -> None:
        for i, (key, slot) in enumerate(self.queue[:number]):
            if slot is not None:
                self.store.read_into(key, slot)
                self.queue[i] = key, None

    def close(self) -> None:
        """Nothing is in flight: fetches run where they are waited for."""


class Failing(FileReader):
    """A reader whose third read fails, as that of a broken disk."""

    fails_at = 3

    def _read(self, key: Key, slot: Tensor) -> None:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise OSError(5, "Input/output error")
        super()._read(key, slot)
