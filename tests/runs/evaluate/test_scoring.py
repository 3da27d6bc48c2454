"""Scores of tokens: every token once, with enough context, independent of padding and of the other
texts."""

import io
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.runs.evaluate import scoring
from scmoe.runs.evaluate.scoring import Scorer, Text, score_test_split, score_text, scored_windows
from tests.support.models import tiny, tiny_model

CONTEXT, VOCABULARY = 12, 64


def scorer(*overrides: str, dropless: bool = True) -> Scorer:
    capacity = "null" if dropless else "0.5"
    model = tiny_model(
        tiny(f"moe.capacity_factor={capacity}", "moe.rows=filled", *overrides)
    ).eval()
    return Scorer(torch.no_grad()(model), CONTEXT, torch.device("cpu"))


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCABULARY, size=length)


@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 20), st.data())
def test_every_token_is_scored_once_with_enough_context(num_tokens, first, context, data):
    stride = data.draw(st.integers(1, context))
    windows = list(scored_windows(num_tokens, first, context, stride))
    scored = [token for window in windows for token in range(window.first, window.stop)]
    assert scored == list(range(first, num_tokens))
    for start, begin, stop in windows:
        assert 1 <= stop - 1 - start <= context, "the model reads up to its context"
        assert begin - start >= min(begin, context - stride + 1), (
            "the tokens before the first one that is scored"
        )


def test_a_score_is_the_sum_over_the_models_own_predictions():
    score, tokens = scorer(), ids(10)
    (found,) = score([(tokens, 4)])
    logits = score.forward(torch.from_numpy(tokens[None, :-1]), torch.ones(1, 9, dtype=torch.bool))[
        0
    ][0]
    predicted = logits.log_softmax(-1)
    expected = sum(predicted[i - 1, tokens[i]].item() for i in range(4, 10))
    assert found.log_likelihood == pytest.approx(expected, abs=1e-12)
    assert found.num_tokens == 6
    assert not found.greedy
    likeliest = np.r_[tokens[:4], logits[3].argmax().item()]
    assert score([(likeliest, 4)])[0].greedy


def together_and_alone(score: Scorer) -> list[float]:
    sequences = [(ids(length, seed=length), 3) for length in (5, 9, 13, 30, 6, 11, 13)]
    together = [found.log_likelihood for found in score(sequences)]
    alone = [score([sequence])[0].log_likelihood for sequence in sequences]
    return [abs(a - b) for a, b in zip(together, alone, strict=True)]


@pytest.mark.parametrize("architecture", ["scmoe", "top_k", "shared_expert", "dgmoe"])
def test_padding_and_other_texts_change_no_score(architecture):
    assert max(together_and_alone(scorer(f"moe.architecture={architecture}"))) < 1e-11
    assert max(together_and_alone(scorer(dropless=False))) > 1e-3, "with a capacity they would"


def text_scorer(surer: bool) -> Scorer:
    """Return a scorer of a model that knows nothing, or that predicts id 0, the surer the more
    tokens it has seen."""

    def forward(inputs, mask):
        logits = torch.zeros(*inputs.shape, VOCABULARY, dtype=torch.float64)
        if surer:
            logits[..., 0] = torch.arange(1, inputs.shape[1] + 1)
        return (logits,)

    return Scorer(forward, CONTEXT, torch.device("cpu"))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    found = score_text(
        text_scorer(surer=False), Text("a text", ids(100)), 5, np.full(VOCABULARY, 2)
    )
    assert found["perplexity"] == pytest.approx(VOCABULARY)
    assert found["bits_per_byte"] == pytest.approx(math.log2(VOCABULARY) / 2)
    assert (found["tokens"], found["window"], found["stride"]) == (99, CONTEXT, 5)


def test_each_part_is_named_before_its_first_pass(capsys):
    said = list[str]()

    def forward(inputs, mask):
        said.append(capsys.readouterr().err)
        return (torch.zeros(*inputs.shape, VOCABULARY),)

    scorer = Scorer(forward, CONTEXT, torch.device("cpu"))
    score_text(scorer, Text("my text", ids(100)), 5, np.full(VOCABULARY, 2))
    assert "my text" in said[0]
    batch = {
        "input_ids": torch.zeros(1, 4, dtype=torch.int64),
        "labels": torch.zeros(1, 4, dtype=torch.int64),
        "padding_mask": torch.ones(1, 4, dtype=torch.bool),
        "num_bytes": torch.ones(1),
    }
    data = Mock(spec=SequenceDataModule, test_dataloader=lambda: [batch])
    said.clear()
    score_test_split(scorer, data)
    assert "test split" in said[0]


def test_the_progress_of_an_evaluation_reaches_its_end_on_a_terminal(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(scoring, "console", lambda: screen)
    with scoring.progress_counter("my text", 7) as advance:
        advance(3)
        advance(4)
    assert "my text" in screen.file.getvalue() and "100%" in screen.file.getvalue()


def test_more_context_is_shown_where_the_stride_is_smaller():
    zeros, scorer = Text("zeros", np.zeros(100, np.int64)), text_scorer(surer=True)
    by_stride = [
        score_text(scorer, zeros, stride, np.ones(VOCABULARY))["loss"] for stride in (1, 3, 6, 12)
    ]
    assert by_stride == sorted(by_stride) and by_stride[0] < by_stride[-1]
