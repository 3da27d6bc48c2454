"""The tokens of text data are the text, every world size sees the same batches, and resuming
changes nothing."""

from functools import partial

import numpy as np
import pytest

from scmoe.datamodules.tokenizer import make_tokenizer
from scmoe.training.run.samples import SAMPLE_TEXTS, first_lines
from tests.support.texts import open_texts, write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="module")
def make(folder):
    return partial(open_texts, folder, folder.parent / "cache")


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


def test_samples_continue_the_first_lines_of_held_out_documents(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "test"):
        (texts / f"{split}.txt").write_text("the state of our union is strong\n" * 100)
    (texts / "val.txt").write_text("ONE TITLE\n\nthe state of our union is strong\n" * 20)
    data = open_texts(texts, tmp_path / "cache")
    end, decode = data.tokenizer.end_of_text, data.tokenizer.decode
    lines = first_lines(data, 48)
    assert len(lines) == SAMPLE_TEXTS and all(line[0] == end for line in lines)
    assert {decode(line[1:]).strip() for line in lines} == {"ONE TITLE"}
    assert all("\n" in decode(line[1:]) for line in lines)
    assert [len(line) for line in first_lines(data, 3)] == [3] * SAMPLE_TEXTS
    assert first_lines(data, 1) == [[end]] * SAMPLE_TEXTS
