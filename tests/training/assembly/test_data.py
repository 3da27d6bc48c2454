"""Data that cannot be used is one line that names the file or the split, before a process or run
starts; files that cannot be read are named, or skipped and counted; all of them are found before a
training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.datamodules.documents import text
from scmoe.datamodules.positioned import IGNORE
from scmoe.datamodules.tokenizer import make_tokenizer
from scmoe.training.assembly.data import build_datamodule, prepare_data

pytestmark = [pytest.mark.faults, pytest.mark.representative]

LINE = "It was a bright cold day, and the clocks were striking.\n"


def folder_of(tmp_path: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a": LINE.encode(), "b": "é".encode("latin-1")},
            "b.txt cannot be read: 'utf-8' codec can't decode",
        ),
        ({"a": LINE.encode("utf-16")}, "a.txt cannot be read: 'utf-8' codec can't decode"),
        ({"a": LINE.encode(), "b": bytes(100)}, "b.txt has zero bytes, so it is no text"),
        ({}, "which has no text"),
        ({"a": b""}, "which has no text"),
        (
            {"a": LINE.encode() * 4},
            "tokens, allowed: 1025 or more with data.seq_len 1024; give more text",
        ),
    ],
    ids=["Latin-1", "UTF-16", "binary", "empty folder", "empty file", "too short"],
)
def test_data_that_cannot_be_used_is_one_line(files, message, tmp_path, capsys):
    folder, runs = tmp_path / "data", tmp_path / "runs"
    folder.mkdir()
    folder_of(folder, **files)
    words = [
        "data.name=text",
        f"data.path={folder}",
        f"data.cache_dir={tmp_path}/cache",
        "data.seq_len=1024",
    ]
    settings = [*words, "data.vocab_size=300", "trainer.devices=2", f"runs_dir={runs}"]
    assert call("train", "configs/debug.yaml", *settings) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and message in said[-1]
    assert not runs.exists(), "no run was started"


def test_unreadable_texts_are_skipped_and_counted(tmp_path, capsys):
    folder, runs = tmp_path / "data", tmp_path / "runs"
    folder.mkdir()
    folder_of(
        folder, a=LINE.encode() * 40, b=bytes(100), c="é".encode("latin-1"), d=LINE.encode() * 40
    )
    words = [
        "data.name=text",
        f"data.path={folder}",
        f"data.cache_dir={tmp_path}/cache",
        "data.vocab_size=300",
    ]
    settings = [
        "configs/debug.yaml",
        *words,
        f"runs_dir={runs}",
        "trainer.max_steps=1",
        "data.on_error=skip",
    ]
    assert call("train", *settings) == 0
    said = capsys.readouterr()
    assert (
        "warning: 2 files are skipped: data.path: " in said.err
        and "b.txt has zero bytes" in said.err
    )
    assert json.loads(said.out)["skipped"] == 2
    source = text(folder, skip=True)
    assert "".join("".join(documents) for documents in source.documents.values()) == LINE * 80


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_a_file_of_rows_is_not_read_as_prose(suffix, tmp_path):
    file = tmp_path / f"rows{suffix}"
    file.write_text(LINE * 40)
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"not prose.* data\.name=hf data\.path=FOLDER"):
            text(file, skip)


def test_a_link_to_a_text_that_is_gone_is_named(tmp_path):
    folder_of(tmp_path, a=LINE.encode() * 40)
    (tmp_path / "b.txt").symlink_to("gone.txt")
    with pytest.raises(ValueError, match=r"b\.txt cannot be read"):
        text(tmp_path)
    assert len(text(tmp_path, skip=True).skipped) == 1


@pytest.fixture
def images(tmp_path):
    """Return a folder of six training and four validation images; one of each is damaged."""
    for split, number in (("train", 3), ("val", 2)):
        for label in ("ant", "bee"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (9, 9), (40 * i, 0, 0)).save(tmp_path / split / label / f"{i}.png")
    for path in (tmp_path / "train/ant/1.png", tmp_path / "val/bee/0.png"):
        path.write_bytes(path.read_bytes()[:40])
    return tmp_path


def swin(folder: Path) -> list[str]:
    words = (
        "data.name=image_folder data.num_classes=2 data.global_batch_size=2 data.val_sequences=null"
    )
    return ["configs/quickstart_vision.yaml", *words.split(), f"data.path={folder}"]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_a_damaged_image_is_named_when_it_is_met(images, workers):
    data = build_datamodule(
        load_config(
            swin(images)[0], [*swin(images)[1:], f"data.workers={workers}", "trainer.max_steps=3"]
        )
    )
    with pytest.raises(ValueError, match=r"data\.path: .*train/ant/1\.png cannot be read"):
        list(data.train_dataloader())
    with pytest.raises(ValueError, match=r"data\.path: .*val/bee/0\.png cannot be read"):
        list(data.val_dataloader())


def test_damaged_images_are_replaced_in_training_left_out_of_validation_and_counted(images):
    data = build_datamodule(
        load_config(
            swin(images)[0], [*swin(images)[1:], "data.on_error=skip", "trainer.max_steps=3"]
        )
    )
    train_batches, val_batches = list(data.train_dataloader()), list(data.val_dataloader())
    assert sum(int(batch["skipped"].sum()) for batch in train_batches) == 1, (
        "three batches of two are one epoch"
    )
    assert torch.cat(
        [batch["labels"].argmax(1) for batch in train_batches]
    ).bincount().tolist() == [3, 3]
    assert sum(int(batch["skipped"].sum()) for batch in val_batches) == 1
    assert sorted(torch.cat([batch["labels"] for batch in val_batches]).tolist()) == [
        IGNORE,
        0,
        0,
        1,
    ]


def test_check_data_names_every_unreadable_file(images, tmp_path, capsys):
    assert call("check-data", *swin(images)) == 2
    said = capsys.readouterr()
    assert [re.findall(r"\w+/\w+/\d\.png", line)[0] for line in said.out.splitlines()] == [
        "train/ant/1.png",
        "val/bee/0.png",
    ]
    assert said.err.splitlines()[-1].startswith("error: 2 file(s) cannot be read. ")
    for broken in ("train/ant/1.png", "val/bee/0.png"):
        (images / broken).unlink()
    assert call("check-data", *swin(images)) == 0
    assert capsys.readouterr().out == "all data of image_folder can be read\n"


def test_check_data_reads_texts_too(tmp_path, capsys):
    folder_of(tmp_path, a=LINE.encode() * 40, b=bytes(100))
    words = [
        "data.name=text",
        f"data.path={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        "data.vocab_size=300",
    ]
    assert call("check-data", "configs/debug.yaml", *words) == 2
    said = capsys.readouterr()
    assert "b.txt has zero bytes" in said.out and "skipped" not in said.err, (
        "a training would not skip it"
    )
    assert call("check-data", "configs/debug.yaml", *words, "data.on_error=skip") == 0, (
        "it may be a gate"
    )
    said = capsys.readouterr()
    assert (
        "b.txt has zero bytes" in said.out
        and said.out.splitlines()[-1].startswith("1 file(s) ")
        and not said.err
    )
    assert call("check-data", "configs/debug.yaml") == 0, "data without files can be checked too"


@pytest.mark.parametrize(
    "files",
    [{"a": b"word " * 400}, {"a": b"word " * 300, "b": b"word " * 300}, {"a": LINE.encode() * 40}],
    ids=["one line", "two files of one line each", "many lines"],
)
def test_a_text_of_long_lines_is_cut_inside_a_line(files, tmp_path):
    whole = b"".join(files.values()).decode()
    source = text(folder_of(tmp_path, **files))
    parts = {split: "".join(documents) for split, documents in source.documents.items()}
    assert "".join(parts[split] for split in ("train", "val", "test")) == whole
    for split in ("val", "test"):
        assert 0.02 * len(whole) < len(parts[split]) < 0.08 * len(whole)


def test_weights_of_hugging_face_are_read_with_their_own_tokenizer(tmp_path):
    """Ids of another one would mean other words."""
    folder = tmp_path / "hf"
    folder.mkdir()
    make_tokenizer("bpe", 300, ["another text, with other pairs of letters. "]).save(
        folder / "tokenizer.json"
    )

    def prepared(*words: str) -> None:
        words = ("data.vocab_size=300", f"data.cache_dir={tmp_path}", *words)
        prepare_data(build_datamodule(load_config(None, ["data.name=sotu", *words])), folder)

    with pytest.raises(ConfigError, match=r"Use data\.tokenizer=.*hf/tokenizer\.json"):
        prepared()
    prepared(f"data.tokenizer={folder / 'tokenizer.json'}")
    (folder / "tokenizer.json").write_text("{}")
    prepared()
