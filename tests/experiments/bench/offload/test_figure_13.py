"""The kept figures of offloading are read and written without a change."""

import json

from experiments.bench.offload.figure_13 import first_case_figures, read_architectures
from experiments.bench.row import to_json
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
