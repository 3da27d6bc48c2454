"""What a report is made of is found, or refused with what is allowed."""

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.runs.html_report import kept_reports
from scmoe.runs.html_report.sources import find_sources
from tests.support import reported

pytest.importorskip("matplotlib")


def test_a_folder_shows_its_newest_runs_and_what_it_recognises(tmp_path):
    for day in (1, 2, 3):
        reported.write_run(tmp_path / "runs", stamp=f"2026112{day}-101500")
    reported.write_json(tmp_path / "runs" / "speeds.json", reported.speeds())
    reported.write_json(tmp_path / "runs" / "other.json", {"a": 1})
    sources, _ = find_sources([str(tmp_path / "runs")], 2)
    assert [run.path.name[:8] for run in sources.runs] == ["20261123", "20261122"]
    assert [report.title for report in sources.reports] == ["speeds"]


def test_an_unknown_name_lists_those_that_exist(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    (docs / "figures/two-batches").mkdir(parents=True)
    (docs / "results").mkdir()
    for name in ("figures/two-batches/a", "figures/overlap-a", "results/layer"):
        reported.write_json(docs / f"{name}.json", reported.speeds())
    reported.write_json(docs / "results/conditions.json", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kept_reports, "CHECKOUT", tmp_path)
    with pytest.raises(ConfigError, match=r"or a result: layer, overlap-a, two-batches\.$"):
        find_sources(["xyz"], 1)
    with pytest.raises(ConfigError, match=r"or a result: two-batches\.$"):
        find_sources(["two_batch"], 1)
    sources, _ = find_sources(["two-batches"], 1)
    assert [report.title for report in sources.reports] == ["a"]


def test_nothing_to_report_names_what_is_allowed(tmp_path):
    with pytest.raises(ConfigError, match="a folder of runs"):
        find_sources([str(tmp_path)], 12)
