"""A cache of tokens is complete or rebuilt, and it holds the documents."""

import json
import os
import pickle
import subprocess
import sys
from functools import partial

import pytest

from scmoe.datamodules.documents import text
from scmoe.datamodules.token_cache import this_machine
from scmoe.datamodules.tokenizer import END_OF_TEXT
from tests.support.texts import open_texts, write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def make(folder):
    return partial(open_texts, folder, folder.parent / "cache")


def bytes_of(data, split):
    return json.loads((data.folder / "header.json").read_text())["splits"][split]["bytes"]


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
    # a worker gets the path, not the tokens
    assert len(pickle.dumps(data.splits.tokens["train"])) < 500
