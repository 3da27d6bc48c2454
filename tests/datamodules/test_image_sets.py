"""Sets of images are read as they are published; a file that is missing or broken is named."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.datamodules.image_sets import (
    ImageSplits,
    digits,
    fashion_mnist,
    image_folder,
    open_images,
    read_idx,
)
from scmoe.training.assembly.data import build_datamodule
from tests.support.images import module, write_fashion, write_idx


@pytest.fixture
def fashion(tmp_path) -> Path:
    return write_fashion(tmp_path)


@pytest.fixture
def splits(fashion) -> ImageSplits:
    return fashion_mnist(fashion)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write pictures of two classes: 3 of each for training, 2 for validation."""
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ape", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (20, 12), (40 * i, 200 * label, 0))
                picture.save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_all_digits_are_loaded_and_split_by_position():
    splits = digits()
    train, val = splits.images["train"], splits.images["val"]
    assert (len(train), len(val), splits.num_classes) == (1437, 360, 10)
    from sklearn.datasets import load_digits

    found = load_digits()
    picture, label = val[1]
    assert label == found.target[5]
    assert np.array_equal(
        np.asarray(picture)[:, :, 0], (found.images[5] * 255 / 16).astype(np.uint8)
    )
    assert {label for _, label in (val[i] for i in range(len(val)))} == set(range(10))


def test_fashion_mnist_from_a_folder(fashion):
    splits = fashion_mnist(fashion)
    assert (len(splits.images["train"]), len(splits.images["val"]), splits.num_classes) == (
        12,
        5,
        3,
    )
    picture, label = splits.images["val"][4]
    assert (picture.mode, picture.size, label) == ("RGB", (4, 4), 1)
    before = splits.content
    write_idx(fashion / "t10k-labels-idx1-ubyte.gz", np.array([0, 1, 2, 0, 2]))
    assert fashion_mnist(fashion).content != before


def test_the_quickstart_reads_fashion_mnist_from_a_path(fashion):
    words = [f"data.path={fashion}", "data.num_classes=3", "data.global_batch_size=4"]
    data = build_datamodule(load_config("configs/quickstart_fashion.yaml", words))
    assert data.name == "fashion_mnist"
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (4, 3, 32, 32) and batch["labels"].shape == (4, 3)


def test_image_folder(folder):
    splits = open_images("image_folder", str(folder))
    train, val = splits.images["train"], splits.images["val"]
    assert (len(train), len(val), splits.num_classes) == (6, 4, 2)
    picture, label = train[5]
    assert (picture.getpixel((0, 0)), label) == ((80, 200, 0), 1)


def test_missing_or_wrong_data_is_named(tmp_path, fashion, folder):
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
        open_images("fashion_mnist", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"data\.path is .*none, which needs folders train/CLASS"):
        image_folder(tmp_path / "none")
    (folder / "val/bee").rename(folder / "val/cow")
    with pytest.raises(ValueError, match="different classes"):
        image_folder(folder)
    write_idx(fashion / "train-labels-idx1-ubyte.gz", np.zeros(11))
    with pytest.raises(ValueError, match="12 images and 11 labels"):
        fashion_mnist(fashion)
    with pytest.raises(ValueError, match=r"data\.num_classes is 7, allowed: 10"):
        module(digits(), num_classes=7)
    with pytest.raises(
        ConfigError, match=r"data\.num_classes is 1, allowed: int, 2 to"
    ):  # there is no such accuracy
        load_config("configs/quickstart_fashion.yaml", ["data.num_classes=1"])


HEADER = bytes((0, 0, 8, 1)) + struct.pack(">I", 3)
BAD_IDX = {
    "not gzip": b"abc",
    "cut gzip": gzip.compress(HEADER + b"abc")[:-6],
    "cut header": gzip.compress(HEADER[:6]),
    "float32": gzip.compress(bytes((0, 0, 13, 1)) + HEADER[4:] + b"abc"),
    "two-dimensional": gzip.compress(bytes((0, 0, 8, 2)) + HEADER[4:] * 2 + bytes(9)),
    "short": gzip.compress(HEADER + b"ab"),
    "long": gzip.compress(HEADER + b"abcd"),
    "damaged gzip": gzip.compress(HEADER)[:10] + b"\xff",  # a block of a type that does not exist
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_a_bad_idx_file_is_refused_in_one_line(case, tmp_path):
    file = tmp_path / "x.gz"
    file.write_bytes(BAD_IDX[case])
    with pytest.raises(ValueError, match=r"x\.gz") as caught:
        read_idx(file, 1)
    assert len(str(caught.value).splitlines()) == 1


def test_an_idx_file_of_impossible_size_is_refused(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + b"\xff" * 12))
    with pytest.raises(ValueError, match=r"x\.gz"):
        read_idx(tmp_path / "x.gz", 3)
