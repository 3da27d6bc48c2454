"""A table's results have differences, decisions, speeds and losses at equal time; its page and
charts show them."""

import json

from experiments.tables import make
from experiments.tables.make import make_table
from experiments.tables.table_file import TableOptions, load_table
from experiments.tables.table_plan import plan_table
from experiments.tables.table_report import write_report
from scmoe.command_line import call
from scmoe.sweeps.jobs import State
from tests.support.tables import CONFIGS, POS2, POS3, write_speeds


def test_files(made):
    table, runs = made
    page, kept, chart = write_report(table, "smoke", runs, "")
    text = page.read_text()
    parts = text.partition("## Quality at equal time")
    assert parts[0].count(f"| {POS2} |") == 2, "the row is in both of its groups"
    assert parts[0].count("| top-2 |") == 1
    assert f"Incomplete: {POS2}: 1 failed, 0 to run; {POS3}: 0 failed, 1 to run." in text
    assert json.loads(kept.read_text())["rows"][0]["ours"]["n"] == 3
    write_speeds(runs[0].job.study, 0.52)
    *_, at_equal_time = write_report(table, "smoke", runs, "")
    assert [path.name for path in (chart, at_equal_time)] == ["chart.png", "equal_time.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (chart, at_equal_time))


def test_no_report_is_made_over_runs_that_have_read_different_data(tmp_path, capsys):
    """The text behind data.path was edited between two calls. The kept states of Tables 1 and 7 do
    not say what was read."""
    plan = plan_table(
        load_table("table4", CONFIGS), TableOptions(seeds=1), [f"runs_dir={tmp_path}"]
    )
    for i, run in enumerate(plan.runs):
        results = {"digest": run.digest, "summary": {}, "data": (None, "old", "new", "new")[i]}
        run.job.state = State("finished", "/somewhere", results=results)
        run.job.keep()
    made = make_table(plan)
    assert (made.finished, made.failed, *plan.folder.glob("table.md")) == (4, 1)
    assert capsys.readouterr().err.endswith(f", remove {plan.runs[1].job.state_file}\n")


def test_the_summary_has_no_decision_of_an_earlier_call(tmp_path, capfd, monkeypatch):
    """Where no report is possible, results.json is that of other runs."""
    monkeypatch.setattr(make, "make_table", lambda plan: make.TableOutcome(failed=1))
    folder = tmp_path / "tables/quality-smoke"
    folder.mkdir(parents=True)
    kept = {"decision": {"margin": 0.01}}
    (folder / "results.json").write_text(json.dumps(kept), encoding="utf-8")
    assert call("table", "quality", "--scale", "smoke", f"runs_dir={tmp_path}") == 1
    assert "margin" not in json.loads(capfd.readouterr().out.splitlines()[-1])
