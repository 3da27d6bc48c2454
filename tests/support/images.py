"""Small sets of images as the tests of datamodules use them."""

import gzip
import struct
from pathlib import Path

import numpy as np

from scmoe.datamodules.image_sets import ImageSplits
from scmoe.datamodules.images import ImageDataModule


def write_idx(file: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion(folder: Path) -> Path:
    """Write the four files of Fashion-MNIST, with 12 and 5 pictures of 4 x 4 pixels."""
    generator = np.random.default_rng(0)
    for stem, count in (("train", 12), ("t10k", 5)):
        write_idx(
            folder / f"{stem}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 4, 4))
        )
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", np.arange(count) % 3)
    return folder


def module(splits: ImageSplits, **changes) -> ImageDataModule:
    settings = dict(
        image_size=8,
        num_classes=splits.num_classes,
        global_batch_size=4,
        accumulate=1,
        num_batches=9,
    )
    return ImageDataModule(splits, **{**settings, "workers": 0, "seed": 3, **changes})
