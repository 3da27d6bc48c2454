"""Limits of an iteration: transfers beside the computation, and gradients beside the last batch."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.bench.overlap.limits import (
    PAYLOAD,
    in_parallel,
    least_time,
    least_times,
    row_bytes,
    rows_over_gradients,
)
from experiments.bench.rank_bench import VariantTimes
from experiments.bench.setting import Setting, tokens_for
from experiments.bench.stacks import Variant
from scmoe.schedule.schedule import Schedule


@pytest.mark.parametrize(
    ("ratio", "accumulate", "every", "ranks"),
    [(3.0, 1, 2, 2), (1.0, 1, 2, 2), (3.0, 4, 2, 2), (3.0, 1, 1, 2), (3.0, 1, 2, 4)],
)
def test_the_tokens_of_a_batch_give_the_wanted_ratio_of_rows_and_gradients(
    ratio, accumulate, every, ranks
):
    """By the report's own count of both, with the gradients of four attentions, and of an MLP in
    each block that has no MoE."""
    sizes = {"dim": 256, "ffn_dim": 1024, "seq_len": 16}
    setting = Setting(level="iteration", every=every, accumulate=accumulate, ranks=ranks, **sizes)
    setting = replace(setting, tokens=tokens_for(ratio, setting))
    weights = 4 * 4 * 256**2 + (2 * 2 * 256 * 1024 if every == 2 else 0)
    found = SimpleNamespace(setting=setting, gradients={"top2": [(0.5, 4 * weights)]})
    assert rows_over_gradients(found, "top2") == pytest.approx(ratio, rel=0.02)  # whole sequences


@pytest.mark.parametrize(
    ("layout", "rows"),
    [("dropless", 1), ("capacity:2", 2), ("buffers:1.5", 1.5), ("buffers:9", 2), ("capacity:9", 4)],
)
def test_empty_slots_and_rows_of_buffers_travel_too(layout, rows):
    """A buffer has at most all copies of the two ranks, one of 8 experts at most all tokens."""
    usual = Setting(level="iteration", tokens=256)
    setting = replace(usual, layout=layout)
    assert row_bytes(setting, "top2") == rows * row_bytes(usual, "top2")
    assert tokens_for(3.0, setting) < tokens_for(3.0, usual) or rows == 1


def test_gradients_are_summed_beside_the_last_batch_only():
    """Without gradients a step of four batches takes four times as long at least; with them, one
    sum longer."""
    setting = Setting(level="iteration", accumulate=4)
    alone = VariantTimes(1.0, np.full(2, 12.0), np.full(2, 4.0), 0.0, np.zeros(2))
    times = {Variant("top2", Schedule("top_k"), "alone"): alone}
    for size, least in ((0, 12.0), (10**9, 10**9 * 8 / (1e8 * PAYLOAD) + 4.0 + 6.0)):
        found = SimpleNamespace(
            setting=setting,
            rate=100.0,
            times=times,
            gradients={"top2": [(0.0, size)]},
            load="balanced",
        )
        assert least_times(found, "top2") == pytest.approx([least] * 2, rel=0.02)


@pytest.mark.parametrize(
    ("transfers", "end"),
    [
        ([], 10.0),
        ([(0.0, 4.0), (3.0, 5.0)], 10.0),  # all of it hides
        ([(0.0, 4.0), (0.0, 9.0)], 13.0),  # the link is busy from the start
        ([(2.0, 9.0), (2.0, 4.0)], 15.0),  # the link is idle until there is something to send
        ([(9.5, 2.0), (0.0, 1.0)], 11.5),  # the last gradient is sent after the computation
        ([(0.0, 8.0), (4.0, 1.0), (6.0, 5.0)], 14.0),  # the backlog at 6 is 3 long
    ],
)
def test_transfers_take_turns_beside_the_computation(transfers, end):
    assert in_parallel(10.0, transfers) == end


def test_an_iteration_has_no_gradients_in_forward_and_updates_after_the_last():
    assert least_time(5.0, 10.0, 1.0, rows=2.0, gradients=[(1.0, 3.0)]) == 16.0
    assert least_time(5.0, 10.0, 1.0, rows=7.0, gradients=[(1.0, 6.0)]) == 7.0 + 13.0 + 1.0


def test_one_rank_alone_counts_as_two_where_its_tokens_are_found():
    """On a GPU: nothing leaves it, but the tokens of its iteration are those of two ranks."""
    setting = Setting(level="iteration", device="cuda")
    weights = 4 * 4 * 256**2 + 2 * 2 * 256 * 1024
    found = SimpleNamespace(setting=setting, gradients={"top2": [(0.5, 4 * weights)]})
    assert setting.ranks == 1
    assert rows_over_gradients(found, "top2") == pytest.approx(3.0, rel=0.02)
