"""The kept figures of offloading are read and written without a change."""

import json

import pytest

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
