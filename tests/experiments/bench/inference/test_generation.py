"""Generation with a cache and without gives the same tokens."""

import pytest

from experiments.bench.inference import generation

pytestmark = pytest.mark.inference


@pytest.mark.smoke
def test_generation_with_a_cache_and_without_gives_the_same_tokens_and_a_table():
    """`measure` raises where a token differs."""
    report = generation.measure(0, 1, tokens=6, rounds=2).report()
    assert report["decode_over_operators"] > 1
    assert min(report[name] for name in generation.FIGURE_WORDS) > 0
    assert {"shared_expert", "head"} <= report["operators_ms"].keys()
    figures, operators = generation.tables(report)
    assert "a decoding step, ms" in figures.markdown() and "head" in operators.markdown()
