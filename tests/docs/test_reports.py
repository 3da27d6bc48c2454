"""`make reports` runs the commands that the benches take, for the reports that are missing only."""

import json
import subprocess

import pytest

from docs.build import reports
from experiments.bench.offload.figure_13 import first_case_figures, read_architectures
from experiments.bench.row import to_json
from scmoe.command_line import build_app
from tests.support.pages import ROOT


@pytest.mark.parametrize("report", reports.REPORTS, ids=[one.name for one in reports.REPORTS])
def test_a_bench_takes_the_words_of_a_report_that_is_kept(report):
    words = report.command[report.command.index("experiments.bench") + 1 :]
    build_app("bench").parse_args(["bench", *words], exit_on_error=False, print_error=False)
    json.loads((ROOT / report.path).read_text(encoding="utf-8"))


def test_reports_that_are_missing_are_measured_until_one_fails(tmp_path, monkeypatch, capsys):
    started = []
    codes = {"a": 0, "c": 3}

    def call(command):
        name = command[3]
        started.append(name)
        (tmp_path / f"{name}.json").write_text("{}")
        return codes[name]

    (tmp_path / "b.json").write_text("{}")
    monkeypatch.setattr(reports, "FOLDER", tmp_path)
    table = tuple(reports.Report(name, name, 1) for name in ("a", "b", "c", "d"))
    monkeypatch.setattr(reports, "REPORTS", table)
    monkeypatch.setattr(subprocess, "call", call)
    assert reports.main([]) == 3
    assert started == ["a", "c"]
    assert reports.main(["--list"]) == 0
    assert "missing  d" in capsys.readouterr().out


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
