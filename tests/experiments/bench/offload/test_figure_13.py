"""The kept figures of offloading are read and written without a change, and its ways are timed on
the same tokens."""

import json
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from experiments.bench.offload import ways
from experiments.bench.offload.cases import RESIDENT
from experiments.bench.offload.figure_13 import first_case_figures, read_architectures
from experiments.bench.other_settings import OffloadSetting
from experiments.bench.row import to_json
from scmoe.config.leaves import ConfigError
from tests.support.pages import ROOT


def test_the_kept_figures_of_offloading_are_read_and_written_without_a_change():
    """Earlier reports have null where a figure was not measured."""
    kept = (ROOT / "docs/figures/figure-13.json").read_text(encoding="utf-8")
    figure = without_null(json.loads(kept))
    architectures = read_architectures(figure)
    assert to_json(architectures) == figure["architectures"]
    assert first_case_figures(architectures) == figure["rows"]


def without_null(value):
    if isinstance(value, list):
        return [without_null(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: without_null(each) for name, each in value.items() if each is not None}


def test_a_machine_that_is_too_busy_is_one_line(monkeypatch):
    kept_none = ways.Times({RESIDENT: [], "blocking": []})
    monkeypatch.setattr(ways, "rounds", lambda *_: kept_none)
    variants = dict.fromkeys((RESIDENT, "blocking"))
    with pytest.raises(ConfigError, match="wait for a core"):
        ways.find_fetch_rate(variants, [], 0.8, OffloadSetting(quick=True))


def test_all_ways_are_timed_on_the_same_tokens(monkeypatch):
    """Every third run is disturbed. A time is the sum of its tokens here."""
    runs = count()

    def timed(run, max_wait):
        result = run()
        return result, None if next(runs) % 3 == 0 else float(run.args[-1].sum())

    monkeypatch.setattr(ways, "undisturbed", timed)
    torch.manual_seed(0)
    setting = OffloadSetting(quick=True, rounds=4, limit_s=60.0)
    model = ways.build(setting, "scmoe_pos2")
    variants = dict.fromkeys((RESIDENT, "blocking", "determinate"), model)
    caches = [SimpleNamespace(hit_rate=0.0) for _ in ways.WAYS]
    times = ways.rounds(variants, caches, 8, setting)
    resident, blocking, determinate = times.seconds.values()
    assert resident == blocking == determinate
    assert len(set(resident)) == times.kept == 4 < times.tried


def test_a_way_can_take_away_what_blocking_costs_beyond_the_exposed_part_of_a_fetch():
    """A fetch of 10 s beside 4 s of computation leaves 6 of the 12 that blocking costs."""
    assert ways.most_hidden(10, 4, 12) == 0.5
    assert ways.most_hidden(10, 10, 12) == ways.most_hidden(3, 10, 4) == 1
    assert ways.most_hidden(10, 0, 8) == 0
