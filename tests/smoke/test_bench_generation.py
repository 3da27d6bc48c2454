"""`bench generation` runs at a small size, and its kinds of generation give the same tokens,
transformers' too."""

import pytest

from tests.support.commands import called

pytest.importorskip("transformers", reason="transformers is not installed (extra `hf`)")
pytestmark = [pytest.mark.smoke, pytest.mark.inference]


def test_a_small_bench_prints_a_table_and_json():
    done = called(
        "bench",
        "generation",
        "--prompt",
        "8",
        "--tokens",
        "6",
        "--rounds",
        "2",
        "--batch",
        "1",
        "2",
    )
    found = done.summary
    assert (
        found["decode_over_operators"] > 1
        and found["cached_over_uncached"] > 0
        and found["cache_limit"] > 0
    )
    assert found["tpot_ms"] > 0 and found["ttft_ms"] > 0 and found["over_transformers"] > 0
    assert (
        found["batch"] == 2
        and found["tpot_ms"] == found["by_batch"]["2"]["tpot_ms"]
        and "1" in found["by_batch"]
    )
    assert "shared_expert" in done.err and "head" in done.err
