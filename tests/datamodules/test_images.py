"""Image data has known formats, a fixed order, random changes by position, smoothed labels and
filler."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from scmoe.datamodules.image_sets import ImageSplits, fashion_mnist
from scmoe.datamodules.images import ImageDataModule
from scmoe.datamodules.positioned import IGNORE
from tests.support.images import module, write_fashion


@pytest.fixture
def fashion(tmp_path) -> Path:
    return write_fashion(tmp_path)


@pytest.fixture
def splits(fashion) -> ImageSplits:
    return fashion_mnist(fashion)


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
