"""`make reports` runs the commands that the benches take, for the reports that are missing only."""

import json
import subprocess

import pytest

from docs.build import reports
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
    monkeypatch.setattr(reports, "REPORTS_FOLDER", tmp_path)
    table = tuple(reports.Report(name, name, 1) for name in ("a", "b", "c", "d"))
    monkeypatch.setattr(reports, "REPORTS", table)
    monkeypatch.setattr(subprocess, "call", call)
    assert reports.main([]) == 3
    assert started == ["a", "c"]
    assert reports.main(["--list"]) == 0
    assert "missing  d" in capsys.readouterr().out
