"""Opens sets of images: Fashion-MNIST, digits, or a folder as ImageNet-1K.

A data set that is missing is an error that says how to get it. No other is used in its place.
"""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
IDX_UINT8 = 8
DIGITS_HELD_OUT = 5  # every fifth digit is for validation, as the file is ordered by writer


class Images(Protocol):
    """Images with their classes."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[Image.Image, int]:
        """Return an RGB image and its class, 0..C-1."""


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class FolderImages:
    """Image files of a torchvision ImageFolder."""

    folder: Any

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        """Return an image and its class. Raises UnreadableImage."""
        try:
            return self.folder[i]
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and others
            raise UnreadableImage(
                f"data.path: {self.folder.samples[i][0]} cannot be read: {error}"
            ) from error


@dataclass(frozen=True)
class ImageSplits:
    """Training and validation images. content: a text that identifies the content."""

    name: str
    images: Mapping[str, Images]
    num_classes: int
    content: str


@dataclass(frozen=True)
class ArrayImages:
    """Grey images in memory: uint8 [N, H, W] and their classes [N]."""

    pixels_NHW: np.ndarray
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels_NHW)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels_NHW[i]).convert("RGB"), int(self.labels_N[i])


def open_images(name: str, path: str | None) -> ImageSplits:
    """Return the splits train and val of `fashion_mnist`, `digits` or `image_folder`.

    path: a folder; None: the usual place. Raises ValueError or ModuleNotFoundError if the data set
    is missing.
    """
    if name == "digits":
        return digits()
    if name == "fashion_mnist":
        return fashion_mnist(FASHION_MNIST if path is None else Path(path))
    assert name == "image_folder" and path is not None
    return image_folder(Path(path))


def digits() -> ImageSplits:
    """Return the 1,797 handwritten digits (UCI) of scikit-learn: 8 x 8 pixels, 17 grey levels."""
    from sklearn.datasets import load_digits

    dataset = load_digits()
    pixels_NHW = (dataset.images * (255 / 16)).astype(np.uint8)
    labels_N = dataset.target
    held_out_N = np.arange(len(labels_N)) % DIGITS_HELD_OUT == 0
    train = ArrayImages(pixels_NHW[~held_out_N], labels_N[~held_out_N])
    val = ArrayImages(pixels_NHW[held_out_N], labels_N[held_out_N])
    return _in_memory("digits", train, val)


def fashion_mnist(folder: Path) -> ImageSplits:
    """Return 60,000 images of clothes, 28 x 28, and 10,000 (the test set) for validation, from
    four idx files."""
    if not folder.is_dir():
        raise ValueError(
            f"data.name fashion_mnist: there is no folder {folder}; run apt-get install"
            " dataset-fashion-mnist, or set data.path to a folder with the four *-ubyte.gz files,"
            " or use data.name=digits"
        )
    splits = []
    for stem in ("train", "t10k"):
        pixels_NHW = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 3)
        labels_N = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 1)
        if len(pixels_NHW) != len(labels_N):
            raise ValueError(
                f"{folder}: {stem} has {len(pixels_NHW)} images and {len(labels_N)} labels"
            )
        splits.append(ArrayImages(pixels_NHW, labels_N))
    return _in_memory("fashion_mnist", *splits)


def image_folder(folder: Path) -> ImageSplits:
    """Return the images of folders train and val, which have a folder for each class, as
    ImageNet-1K. Classes are numbered in the order of names."""
    from torchvision.datasets import ImageFolder

    try:
        train, val = (ImageFolder(str(folder / split)) for split in ("train", "val"))
    except FileNotFoundError as error:
        raise ValueError(
            f"data.path is {folder}, which needs folders train/CLASS and val/CLASS: {error}"
        ) from error
    if train.classes != val.classes:
        raise ValueError(
            f"{folder}: train and val have different classes:"
            f" {set(train.classes) ^ set(val.classes)}"
        )
    names = hashlib.sha256()  # of names only, as the contents may be 100 GB
    for file, _ in [*train.samples, *val.samples]:
        names.update(f"{Path(file).relative_to(folder)}\n".encode())
    images = {"train": FolderImages(train), "val": FolderImages(val)}
    return ImageSplits("image_folder", images, len(train.classes), names.hexdigest())


def read_idx(file: Path, dims: int) -> np.ndarray:
    """Return the uint8 array of `dims` dimensions in a gzipped idx file (LeCun's MNIST format).

    Header: two zero bytes, the type, the number of dimensions, then each size as a big-endian
    uint32. Raises ValueError for any other file. It reads no more than the size in the header.
    """
    expected = f"it must be a gzipped idx file of {dims}-dimensional uint8"
    try:
        with gzip.open(file) as stream:
            header = stream.read(4 + 4 * dims)
            if header[:4] != bytes((0, 0, IDX_UINT8, dims)) or len(header) < 4 + 4 * dims:
                raise ValueError(f"{file}: begins with {header[:4]!r}; {expected}")
            shape = struct.unpack(f">{dims}I", header[4:])
            size = int(np.prod(shape, dtype=object))
            data = stream.read(size)
            if len(data) != size or stream.read(1):
                raise ValueError(f"{file}: does not have the {size} bytes that its header states")
    except (OSError, EOFError, zlib.error) as error:  # OSError: also a file that is not gzip
        raise ValueError(f"{file}: {error}; {expected}") from error
    except (OverflowError, MemoryError) as error:
        raise ValueError(
            f"{file}: states a size that does not fit into memory; {expected}"
        ) from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def _in_memory(name: str, train: ArrayImages, val: ArrayImages) -> ImageSplits:
    content = hashlib.sha256()
    for split in (train, val):
        content.update(split.pixels_NHW.tobytes() + split.labels_N.astype(np.int64).tobytes())
    num_classes = int(max(train.labels_N.max(), val.labels_N.max())) + 1
    return ImageSplits(name, {"train": train, "val": val}, num_classes, content.hexdigest())
