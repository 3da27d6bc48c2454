"""Tokenizers keep text and bytes, and a tokenizer that loses bytes is refused."""

import json
from functools import partial

import numpy as np
import pytest
import tokenizers

from scmoe.datamodules.tokenizer import (
    BYTE_TOKENS,
    GPT2_VOCABULARY,
    Tokenizer,
    make_tokenizer,
    pieces,
)
from tests.support.texts import STRANGE, WORDS, open_texts, write_texts


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return partial(open_texts, write_texts(folder / "texts"), folder / "cache")


@pytest.fixture(scope="module")
def trained():
    return make_tokenizer("bpe", 300, [" ".join(WORDS * 20)])


def test_decode_undoes_encode(trained):
    assert trained.decode(trained.encode(STRANGE)) == STRANGE
    assert trained.encode("").shape == (0,)
    # its spelling in a text is ordinary text
    assert trained.end_of_text not in trained.encode(STRANGE)


def test_token_bytes_sum_to_the_utf8_length(trained):
    num_bytes_V = trained.token_bytes()
    assert num_bytes_V.dtype == np.int64 and num_bytes_V.shape == (trained.vocab_size,)
    assert num_bytes_V[trained.encode(STRANGE)].sum() == len(STRANGE.encode())
    assert num_bytes_V[trained.end_of_text] == 0


def test_pieces_join_to_the_text_and_end_with_lines():
    lines = "one\ntwo and three\n" * 5 + "x" * 40
    cut = list(pieces(lines, 20))
    assert "".join(cut) == lines and all(len(piece) <= 20 for piece in cut)
    assert cut[0].endswith("\n")


def test_gpt2s_own_file_loses_nothing(monkeypatch, trained):
    """Hugging Face's file has the end of text in the vocabulary, as a normalised token, and a
    post-processor."""
    file = json.loads(trained._inner.to_str())
    file["added_tokens"][0]["normalized"] = True
    file["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    downloaded = tokenizers.Tokenizer.from_str(json.dumps(file))
    monkeypatch.setattr(
        tokenizers.Tokenizer, "from_pretrained", {GPT2_VOCABULARY: downloaded}.__getitem__
    )
    tokenizer = make_tokenizer("gpt2", 300, [])
    ids = tokenizer.encode(STRANGE)
    assert ids.tolist() == trained.encode(STRANGE).tolist() and tokenizer.decode(ids) == STRANGE
    assert (
        tokenizer.end_of_text == trained.end_of_text and tokenizer.vocab_size == trained.vocab_size
    )
    assert tokenizer.token_bytes().tolist() == trained.token_bytes().tolist()


def test_without_a_network_gpt2_says_what_to_do_in_one_line(monkeypatch):
    def fail(name):
        raise OSError("An error happened\nwhile trying to locate the file")

    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", fail)
    with pytest.raises(ValueError, match=r"^data\.tokenizer gpt2 cannot be downloaded"):
        make_tokenizer("gpt2", 50257, [])


@pytest.mark.parametrize(
    "normalizer",
    [
        tokenizers.normalizers.BertNormalizer(strip_accents=True),
        tokenizers.normalizers.Replace("s", "S"),
    ],
)
def test_a_tokenizer_that_loses_bytes_or_changes_letters_is_refused(
    normalizer, make, tmp_path, trained
):
    inner = tokenizers.Tokenizer.from_str(trained._inner.to_str())
    inner.normalizer = normalizer
    inner.save(str(tmp_path / "lossy.json"))
    with pytest.raises(ValueError, match="byte-level BPE without normalizer"):
        make(tokenizer=str(tmp_path / "lossy.json"))


def llama(form: str) -> tokenizers.Tokenizer:
    """Return a small tokenizer of LLaMA's kind, in the form of its first tokenizer.json or of
    transformers 5."""
    letters = ["▁", *map(chr, range(0x21, 0x7F)), "é"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("▁", "u")]
    vocabulary = dict.fromkeys(
        ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *letters, *(a + b for a, b in merges)]
    )
    ids = {token: i for i, token in enumerate(vocabulary)}
    bpe = tokenizers.models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    inner, parts = tokenizers.Tokenizer(bpe), tokenizers.decoders
    if form == "old":
        prefix, spaces = (
            tokenizers.normalizers.Prepend("▁"),
            tokenizers.normalizers.Replace(" ", "▁"),
        )
        inner.normalizer = tokenizers.normalizers.Sequence([prefix, spaces])
    else:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", split=False)
    spaces, strip = parts.Replace("▁", " "), parts.Strip(" ", 1, 0)
    inner.decoder = parts.Sequence([spaces, parts.ByteFallback(), parts.Fuse(), strip])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


@pytest.mark.parametrize("form", ["old", "new"])
def test_llamas_own_tokenizer_loses_nothing(form, make, tmp_path):
    """The ids are LLaMA's without the space that LLaMA puts before a text; "▁" itself is encoded by
    its bytes."""
    llama(form).save(str(tmp_path / "llama.json"))
    strange = f"  the{STRANGE}</s> <0x41> ▁the▁ "
    # its tokenizer comes from the cache
    data = make(tokenizer=str(tmp_path / "llama.json"), vocab_size=400)
    ids = data.tokenizer.encode(strange)
    assert data.tokenizer.decode(ids) == strange
    tokenizer = Tokenizer.load(tmp_path / "llama.json")
    assert tokenizer.encode(strange).tolist() == ids.tolist()
    assert tokenizer.token_bytes()[ids].sum() == len(strange.encode())
    assert tokenizer.end_of_text == data.tokenizer.end_of_text == 2 and 2 not in ids
    assert tokenizer.token_bytes()[:3].sum() == 0
    theirs = llama(form).encode("of the union", add_special_tokens=False).ids
    assert theirs == [llama(form).token_to_id("▁"), *data.tokenizer.encode("of the union")]


def test_a_file_that_is_no_lossless_tokenizer_is_refused(make, tmp_path):
    cases = {
        "{}": "is not a tokenizer.json",
        tokenizers.Tokenizer(
            tokenizers.models.BPE()
        ).to_str(): "has none of the tokens <|endoftext|>, </s>",
    }
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "<0x0A>": 1}, [], byte_fallback=True)
    )
    inner.add_tokens(["</s>"])
    cases[inner.to_str()] = "as a special token"
    inner.add_special_tokens(["</s>"])
    cases[inner.to_str()] = "has 1 of the 256 tokens <0x00> to <0xFF>"
    for text_, said in cases.items():
        (tmp_path / "tokenizer.json").write_text(text_)
        with pytest.raises(ValueError, match=said):
            make(tokenizer=str(tmp_path / "tokenizer.json"))


def test_vocabulary_must_fit(make, tmp_path, trained):
    trained.save(tmp_path / "tokenizer.json")
    assert (
        make(tokenizer=str(tmp_path / "tokenizer.json")).tokenizer.decode(trained.encode("union"))
        == "union"
    )
    # A complete cache does not prevent the refusal.
    with pytest.raises(ValueError, match=r"data\.vocab_size is 260, .*json$"):
        make(tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=260)
    with pytest.raises(ValueError, match="allowed: 257 or more"):
        make(vocab_size=256)
    with pytest.raises(ValueError, match="allowed: bpe, gpt2"):
        make(tokenizer="gtp2")
