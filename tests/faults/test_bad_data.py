"""Fault 42: data that cannot be used is one line that names the file or the split, before a process or run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.sources import text
from experiments import train

pytestmark = [pytest.mark.faults, pytest.mark.representative]

LINE = "It was a bright cold day, and the clocks were striking.\n"


def folder_of(tmp_path: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": LINE.encode(), "b": "é".encode("latin-1")}, "b.txt cannot be read: 'utf-8' codec can't decode"),
        ({"a": LINE.encode("utf-16")}, "a.txt cannot be read: 'utf-8' codec can't decode"),
        ({"a": LINE.encode(), "b": bytes(100)}, "b.txt has zero bytes, so it is no text; allowed: text in UTF-8"),
        ({}, "allowed: a text, or a folder with texts in .txt or .md files"),
        ({"a": b""}, "allowed: a text, or a folder with texts in .txt or .md files"),
        ({"a": LINE.encode() * 4}, "tokens, allowed: 1025 or more with data.seq_len 1024; give more text"),
    ],
    ids=["Latin-1", "UTF-16", "binary", "empty folder", "empty file", "too short"],
)
def test_42_data_that_cannot_be_used_is_one_line(files, message, tmp_path, capsys):
    folder, runs = tmp_path / "data", tmp_path / "runs"
    folder.mkdir()
    folder_of(folder, **files)
    words = ["data.name=text", f"data.path={folder}", f"data.cache_dir={tmp_path}/cache", "data.seq_len=1024"]
    settings = [*words, "data.vocab_size=300", "trainer.devices=2", f"runs_dir={runs}"]
    assert train.main(["configs/debug.yaml", *settings]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and message in said[-1]
    assert not runs.exists(), "no run was started"


@pytest.mark.parametrize(
    "files",
    [{"a": b"word " * 400}, {"a": b"word " * 300, "b": b"word " * 300}, {"a": LINE.encode() * 40}],
    ids=["one line", "two files of one line each", "many lines"],
)
def test_42_a_text_of_long_lines_is_cut_inside_a_line(files, tmp_path):
    whole = b"".join(files.values()).decode()
    source = text(folder_of(tmp_path, **files))
    parts = {split: "".join(documents) for split, documents in source.documents.items()}
    assert "".join(parts[split] for split in ("train", "val", "test")) == whole
    for split in ("val", "test"):
        assert 0.02 * len(whole) < len(parts[split]) < 0.08 * len(whole)
