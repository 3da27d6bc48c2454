"""Image data has known formats, a fixed order, random changes by position, smoothed labels and
filler."""

import gzip
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load
from scmoe.datamodules.image_sets import (
    ImageSplits,
    digits,
    fashion_mnist,
    image_folder,
    open_images,
    read_idx,
)
from scmoe.datamodules.images import ImageDataModule
from scmoe.datamodules.positioned import IGNORE
from scmoe.training.assembly.data import build_datamodule


def write_idx(file: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path) -> Path:
    """Write the four files of Fashion-MNIST, with 12 and 5 pictures of 4 x 4 pixels."""
    generator = np.random.default_rng(0)
    for stem, count in (("train", 12), ("t10k", 5)):
        write_idx(
            tmp_path / f"{stem}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 4, 4))
        )
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(count) % 3)
    return tmp_path


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


def module(splits: ImageSplits, **changes) -> ImageDataModule:
    settings = dict(
        image_size=8,
        num_classes=splits.num_classes,
        global_batch_size=4,
        accumulate=1,
        num_batches=9,
    )
    return ImageDataModule(splits, **{**settings, "workers": 0, "seed": 3, **changes})


# ---------------------------------------------------------------------- sources


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
    data = build_datamodule(load("configs/quickstart_fashion.yaml", words))
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
        load("configs/quickstart_fashion.yaml", ["data.num_classes=1"])


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


# ---------------------------------------------------------------------- order, randomness, labels


def batches(data: ImageDataModule) -> list[dict[str, torch.Tensor]]:
    return list(data.train_dataloader())


def on_rank(data: ImageDataModule, rank: int, world: int) -> ImageDataModule:
    data.rank_and_world = lambda: (rank, world)  # type: ignore[method-assign]
    return data


@pytest.mark.parametrize("augment", ("none", "imagenet"))
def test_two_ranks_read_what_one_rank_reads(splits, augment):
    """9 batches of 4 are 3 epochs of 12: order and augmentation depend on the global position."""
    whole = batches(module(splits, augment=augment, label_smoothing=0.1))
    ranks = [
        batches(on_rank(module(splits, augment=augment, label_smoothing=0.1), rank, 2))
        for rank in (0, 1)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for key, value in batch.items():
            assert torch.equal(value[0::2], parts[0][key]) and torch.equal(
                value[1::2], parts[1][key]
            )


def test_augmentation_changes_over_epochs_and_leaves_global_generators_unchanged(splits):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    module(splits, augment="imagenet").train_dataloader().dataset[7]
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])

    first = batches(module(splits, augment="imagenet"))
    torch.manual_seed(6)  # the global generators have no effect
    again = batches(module(splits, augment="imagenet"))
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(first, again, strict=True))
    pictures = torch.cat([batch["images"] for batch in first]).flatten(1)
    assert len(pictures.unique(dim=0)) == 36, "three epochs of 12 pictures have 36 different crops"
    plain = torch.cat([batch["images"] for batch in batches(module(splits))]).flatten(1)
    assert len(plain.unique(dim=0)) == 12


@pytest.mark.parametrize(
    "mix", [{}, {"mixup": 0.8}, {"cutmix": 1.0, "mixup": 0.8, "augment": "imagenet"}], ids=str
)
def test_a_resumed_run_reads_the_remaining_batches(splits, mix):
    whole = batches(module(splits, label_smoothing=0.1, **mix))
    stopped = module(splits, label_smoothing=0.1, **mix)
    for _ in range(4):
        stopped.advance()
    resumed = module(splits, label_smoothing=0.1, **mix)
    resumed.load_state_dict(stopped.state_dict())
    for batch, expected in zip(batches(resumed), whole[4:], strict=True):
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_labels_are_smoothed_probabilities(splits):
    batch, *_ = batches(module(splits, label_smoothing=0.3))
    assert torch.allclose(batch["labels"].sum(1), torch.ones(4))
    assert batch["labels"].unique().tolist() == pytest.approx([0.1, 0.8])


def test_mixup_mixes_pictures_and_labels_with_equal_shares(splits):
    """A picture's share in a mixture equals its label's share."""
    plain = batches(module(splits))[0]
    mixed = batches(module(splits, mixup=0.8))[0]
    difference = plain["images"] - plain["images"].flip(0)
    share = (
        (mixed["images"] - plain["images"].flip(0)) * difference
    ).sum() / difference.square().sum()
    assert 0 < share < 1
    expected = plain["labels"] * share + plain["labels"].flip(0) * (1 - share)
    assert torch.allclose(mixed["labels"], expected, atol=1e-5)


def test_validation_covers_every_picture_once_and_ends_in_filler(splits):
    ranks = [list(on_rank(module(splits), rank, 2).val_dataloader()) for rank in (0, 1)]
    assert [len(rank) for rank in ranks] == [2, 2], "both ranks have the same number of batches"
    labels = torch.stack(
        [torch.cat([batch["labels"] for batch in rank]) for rank in ranks]
    ).T.flatten()
    assert labels.tolist() == [0, 1, 2, 0, 1, IGNORE, IGNORE, IGNORE]
    assert ranks[1][1]["images"].abs().max() == 0, "the last picture is filler"
    limited = list(module(splits, val_images=2).val_dataloader())
    assert limited[0]["labels"].tolist() == [0, 2, IGNORE, IGNORE], "pictures 0 and 2 of 5 are used"


def test_workers_change_nothing(splits):
    alone, together = (
        batches(module(splits, augment="imagenet", num_batches=3, workers=n)) for n in (0, 2)
    )
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(alone, together, strict=True))
