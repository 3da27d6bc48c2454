"""Sequences of tokens: labels, epochs, validation, and synthetic ones."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from scmoe.datamodules.positioned import SampleOrder
from scmoe.datamodules.sequences import SyntheticDataModule, SyntheticTokens
from tests.support.texts import open_texts, opened, write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def make(folder):
    return partial(open_texts, folder, folder.parent / "cache")


def global_batches(ranks, loader="train_dataloader", key="input_ids"):
    """Interleave the ranks' batches into the global ones: row r + W k is row k of rank r."""
    loaders = zip(*(getattr(data, loader)() for data in ranks), strict=True)
    return [
        torch.stack([batch[key] for batch in batches], dim=1).flatten(0, 1) for batches in loaders
    ]


def bytes_of(data, split):
    return json.loads((data.folder / "header.json").read_text())["splits"][split]["bytes"]


def test_labels_are_the_next_tokens(make):
    data = make()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels"}
    assert all(value.shape == (4, 16) and value.dtype == torch.int64 for value in batch.values())
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    first = SampleOrder((len(data.splits.tokens["train"]) - 1) // 16, seed=5)(np.arange(1)).item()
    assert (
        batch["labels"][0].tolist()
        == data.splits.tokens["train"][first * 16 + 1 : first * 16 + 17].tolist()
    )


def test_epochs_are_permutations_and_batches_cross_them():
    order = SampleOrder(10, seed=3)
    seen = np.concatenate([order(np.arange(start, start + 4)) for start in range(0, 40, 4)])
    epochs = seen.reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert order(np.arange(35)).tolist() == seen[:35].tolist()  # several epochs in one call
    assert order(np.arange(4, 8)).tolist() == seen[4:8].tolist()  # earlier positions again


def test_validation_covers_every_target_once(make):
    data = make()
    tokens = torch.from_numpy(data.splits.tokens["val"][:].astype(np.int64))
    windows = list(data.val_dataloader())
    keys = ("labels", "input_ids", "padding_mask")
    labels, inputs, mask = (torch.cat([batch[key] for batch in windows]) for key in keys)
    assert torch.equal(mask, labels != -100) and mask.dtype == torch.bool and not mask.all()
    assert torch.equal(labels[mask], tokens[1:]) and torch.equal(inputs[mask], tokens[:-1])
    assert (inputs[~mask] == 0).all()
    first_bytes = len(data.tokenizer.decode(tokens[:1].tolist()).encode())
    assert (
        sum(batch["num_bytes"].sum().item() for batch in windows)
        == bytes_of(data, "val") - first_bytes
    )


@pytest.mark.parametrize("val_sequences", [None, 7])
def test_validation_is_the_same_for_every_world_size(make, val_sequences):
    how = {"val_sequences": val_sequences, "global_batch_size": 24, "vocab_size": 258}

    def scored(world):
        ranks = [make(rank, world, **how) for rank in range(world)]
        labels = torch.cat(global_batches(ranks, "val_dataloader", "labels"))
        shapes = {tuple(batch["labels"].shape) for data in ranks for batch in data.val_dataloader()}
        assert shapes == {(12 // world, 16)}
        return labels[labels != -100].sort().values.tolist(), ranks[0].unigram_bits_per_byte()

    alone = scored(1)
    if val_sequences:
        assert len(alone[0]) == 7 * 16
    assert scored(2) == alone and scored(3) == alone


def test_synthetic_tokens_are_a_function_of_the_position():
    tokens = SyntheticTokens(seed=1, stream=0, length=50_001, vocab_size=64)
    assert tokens[100:200].tolist() == tokens[:][100:200].tolist()
    assert len(tokens[49_990:60_000]) == 11
    for other in (SyntheticTokens(2, 0, 50_001, 64), SyntheticTokens(1, 1, 50_001, 64)):
        # 7 standard deviations
        assert (tokens[:] == other[:]).mean() == pytest.approx(1 / 64, abs=0.004)
    counts = np.bincount(tokens[:], minlength=64)
    # 781 are expected, the standard deviation is 28
    assert counts.min() > 600 and counts.max() < 970


def synthetic():
    return SyntheticDataModule(
        vocab_size=64, seq_len=8, global_batch_size=4, num_batches=5, val_sequences=6
    )


def test_synthetic_module_keeps_the_same_laws():
    def make(rank=0, world=1):
        return opened(synthetic(), rank, world)

    alone, shared = global_batches([make()]), global_batches([make(rank, 2) for rank in range(2)])
    assert len(alone) == 5 and all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    windows = list(make().val_dataloader())
    assert sum(batch["num_bytes"].sum().item() for batch in windows) == 6 * 8
    # log2 64, and the counts' noise
    assert make().unigram_bits_per_byte() == pytest.approx(6, abs=0.02)
