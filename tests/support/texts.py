"""Write a folder of small documents, and open it as text data on one rank of several."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from scmoe.datamodules.text import TextDataModule
from scmoe.datamodules.tokenizer import END_OF_TEXT

STRANGE = f"naïve 東京 🙂\n\n\ttabs  spaces {END_OF_TEXT}\x00 end "
WORDS = ["the", "state", "of", "our", "union", "is", "strong", "and", "東京", "naïve"]


def write_texts(folder: Path) -> Path:
    """Write three documents of about 12 kB together. The order of the words is random but always
    the same."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.md"):
        lines = (" ".join(generator.choice(WORDS, 8)) for _ in range(100))
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def open_texts(
    folder: Path, cache: Path, rank: int = 0, world: int = 1, **changes: Any
) -> TextDataModule:
    """Open the folder's data as rank `rank` of `world`. changes: settings that replace the
    defaults."""
    settings = {
        "name": "text", "path": str(folder), "vocab_size": 300, "seq_len": 16,
        "global_batch_size": 8, "accumulate": 2, "num_batches": 10, "cache_dir": str(cache),
        "seed": 5,
    }  # fmt: skip
    return opened(TextDataModule(**settings | changes), rank, world)


def opened(data: Any, rank: int = 0, world: int = 1) -> Any:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = (
        SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy)
        if world > 1
        else None
    )
    data.prepare_data()
    data.setup()
    return data
