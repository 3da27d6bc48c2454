"""A link's rate is found at which transfers take a share of the time."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from experiments.bench.rank_bench import Bench
from experiments.bench.rate_search import find_rate
from experiments.bench.setting import Setting
from experiments.engine.ranks import run_ranks

SMALL = dict(dim=64, ffn_dim=128, tokens=512, seq_len=64, compute="real", links="bus")


def shares(rank: int, world_size: int) -> dict[float, float]:
    """Return the rate that is found for each share of communication."""
    dist.init_process_group("gloo")
    found = {}
    for share in (0.1, 0.6):
        bench = Bench(Setting(share, rows=("scmoe_pos2",), **SMALL))
        found[share] = find_rate(bench.setting, bench.set_rate, bench.infer)
    return found


@pytest.mark.ranks
def test_a_larger_share_has_a_lower_rate():
    found = run_ranks(shares, 1)[0]
    assert 0 < found[0.6] < found[0.1]


def rates_tried(rank: int, world_size: int) -> list[list[float]]:
    """Return the rates that two searches try where no rate changes the share. The second begins as
    the first."""
    dist.init_process_group("gloo")
    setting, seconds = (
        Setting(0.52, rows=("top2",), **SMALL | {"links": "loopback"}),
        {"sequential": 1.0, "free": 0.7},
    )
    first: list[float] = []
    second: list[float] = []
    find_rate(setting, first.append, lambda variant: seconds[variant.transfers])
    find_rate(setting, second.append, lambda variant: seconds[variant.transfers], first[0])
    return [first, second]


@pytest.mark.ranks
def test_a_search_does_not_stray_where_the_share_does_not_follow_the_rate():
    first, second = run_ranks(rates_tried, 2)[0]
    assert min(first) == first[0] / 8 and min(second) == first[0] / 2
