"""Every world size sees the same batches, and resuming changes nothing."""

import json
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from scmoe.datamodules.positioned import Watched
from scmoe.datamodules.sequences import SyntheticDataModule
from tests.support.texts import open_texts, write_texts


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


def test_every_world_size_sees_the_same_global_batches(make):
    alone = global_batches([make()])
    assert len(alone) == 10 and all(batch.shape == (4, 16) for batch in alone)
    for world in (2, 4):
        shared = global_batches([make(rank, world) for rank in range(world)])
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_overfitting_repeats_the_first_batches(make):
    repeated, whole = global_batches([make(overfit=2)]), global_batches([make()])
    assert all(torch.equal(a, b) for a, b in zip(repeated, whole[:2] * 5, strict=True))


def test_ranks_must_divide_the_micro_batch(make):
    with pytest.raises(ValueError, match=r"data\.global_batch_size is 8; .* 3 x 2$"):
        make(0, 3).train_dataloader()
    with pytest.raises(ValueError, match=r"data\.global_batch_size is 9; .* 2$"):
        make(global_batch_size=9)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_with_another_world_size(make, workers):
    whole = global_batches([make()])
    before = make(workers=workers)
    batches = iter(before.train_dataloader())
    for _ in range(3):  # workers prefetch; only the samples that were trained on count
        next(batches)
        before.advance()
    state = before.state_dict()
    assert state["consumed_samples"] == 3 * 4

    ranks = [make(rank, 2, workers=workers) for rank in range(2)]
    for data in ranks:
        data.load_state_dict(json.loads(json.dumps(state)))  # the state is plain data
    assert len(ranks[0].train_dataloader()) == 10
    rest = global_batches(ranks)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_a_loader_leaves_the_global_generator_as_it_is(make, loader, workers):
    """If it did not, dropout would differ after a validation and after a resume."""
    before, batches = torch.get_rng_state(), getattr(make(workers=workers), loader)()
    for _ in range(2):
        next(iter(batches))
    assert torch.equal(torch.get_rng_state(), before)


def test_resume_refuses_other_data(make):
    state = make().state_dict()
    for changes in ({"seed": 6}, {"seq_len": 8}, {"vocab_size": 310}):
        with pytest.raises(ValueError, match="resume with the data settings and seed"):
            make(**changes).load_state_dict(state)


def synthetic():
    return SyntheticDataModule(
        vocab_size=64, seq_len=8, global_batch_size=4, num_batches=5, val_sequences=6
    )


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_batches_for_a_gpu_lie_in_pinned_memory(device):
    data, strategy = synthetic(), SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    loaders = data.train_dataloader(), data.val_dataloader()
    assert [loader.pin_memory for loader in loaders] == [device == "cuda"] * 2


def test_the_sample_that_has_raised_is_named_though_its_worker_reads_on():
    last = torch.zeros((), dtype=torch.int64).share_memory_()

    class Numbers(Dataset):
        def __getitem__(self, i: int) -> int:
            last.fill_(i)
            if i == 3:
                raise RuntimeError("no such file")
            return i

        def __len__(self) -> int:
            return 12

    other = Watched(range(4), 1)
    assert len(list(DataLoader(other, num_workers=1))) == 4, "a worker 0 that read all"
    broken = Watched(Numbers(), 1)
    batches = iter(DataLoader(broken, batch_size=2, num_workers=1, prefetch_factor=3))
    next(batches)
    while last < 5:  # the third batch is read before the error of the second one is raised
        time.sleep(0.01)
    with pytest.raises(RuntimeError) as caught:
        next(batches)
    for each in (broken, other):
        each.note(caught.value)
    (note,) = caught.value.__notes__
    assert note.startswith("data worker 0 ") and note.endswith("reading sample 3 of Numbers")
