"""A finished run's results outlive its directory: equal runs are not made again, here or on another machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load
from scmoe.experiments.studies.digest import digest_of
from scmoe.experiments.studies.job import State
from scmoe.experiments.studies.table.copies import adopt, save
from scmoe.experiments.studies.table.evaluations import Evaluations
from scmoe.experiments.studies.table.kept import data_of, look_up
from scmoe.experiments.studies.table.make import Commands, Request, make_table, plan_table
from scmoe.experiments.studies.table.rows import load_table
from scmoe.experiments.studies.table.table_runs import Run, plan_runs, read_states
from scmoe.experiments.table import Options

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/experiment"
DEBUG = ROOT / "configs/debug.yaml"


def runs_of(name: str, folder: Path, seeds: int = 1) -> list[Run]:
    table = load_table(name, CONFIGS)
    return plan_runs(table, table.scales["smoke"], folder / f"tables/{name}-smoke", seeds)


def take(name: str, runs: list[Run], folder: Path) -> int:
    table = load_table(name, CONFIGS)
    return adopt(runs, [folder], Evaluations(table, table.scales["smoke"]))


def finish(run: Run) -> None:
    run.job.state = State("finished", "/somewhere", 9.0, 1.0, results={"digest": run.digest, "summary": {}})
    run.job.keep()


@pytest.mark.parametrize("override", ("optim.lr=0.5", "seed=2", "data.seq_len=32", "moe.top_k=2"))
def test_a_value_that_can_change_a_result_changes_the_digest(override):
    assert digest_of(load(DEBUG, [override])) != digest_of(load(DEBUG))


@pytest.mark.parametrize("override", ("name=other", "runs_dir=elsewhere", "logger.mode=auto", "data.cache_dir=tmp"))
def test_where_a_run_is_kept_does_not_change_its_digest(override):
    assert digest_of(load(DEBUG, [override])) == digest_of(load(DEBUG))


def test_a_table_takes_the_equal_runs_of_another_table(tmp_path):
    for run in runs_of("table1", tmp_path):
        finish(run)
    runs = runs_of("table5", tmp_path)
    read_states(runs)
    assert take("table5", runs, tmp_path / "tables") == 4, "the rows with CG-1"
    assert [run.row.name for run in runs if run.state.status == "finished"] == [
        *("shared-expert, CG-1", "ScMoE Pos-1, CG-1", "ScMoE Pos-2, CG-1", "ScMoE Pos-3, CG-1")
    ]
    assert runs[0].state.results["from"] == "table1-smoke"


def test_another_machine_goes_on_from_what_is_committed(tmp_path):
    here, there, committed = tmp_path / "here", tmp_path / "there", tmp_path / "results"
    first = runs_of("table4", here, seeds=2)
    for run in first[:3]:
        finish(run)
    (first[0].job.study / "results.json").write_text('{"rows": []}')
    (first[0].job.study / "table.md").write_text("# Table 4")
    folder = save(first, committed)
    assert folder == committed / "table4-smoke" and json.loads((folder / "results.json").read_text()) == {"rows": []}
    assert len(list((folder / "states").iterdir())) == 3
    second = runs_of("table4", there, seeds=2)
    assert take("table4", second, committed) == 3
    again = runs_of("table4", there, seeds=2)
    read_states(again)
    assert [run.state.status for run in again] == ["finished"] * 3 + ["waiting"] * 5
    assert again[0].state.run_dir is None, "its directory is on the other machine"


def test_a_run_of_another_config_is_not_taken(tmp_path):
    runs = runs_of("table4", tmp_path)
    for run in runs:
        finish(run)
    table = load_table("table4", CONFIGS)
    other = plan_runs(table, table.scales["smoke"], tmp_path / "other", 1, ["trainer.max_steps=5"])
    assert take("table4", other, tmp_path / "tables") == 0
    assert {run.state.status for run in other} == {"waiting"}


def test_a_folder_that_would_lose_or_ignore_states_is_refused(tmp_path):
    own = [f"runs_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"--to is .*, allowed: a folder other than that of the"):
        plan_table(load_table("table4", CONFIGS), Request("smoke", own, to=tmp_path / "tables"), print)
    with pytest.raises(ConfigError, match=r"--from is .*, allowed: a folder of tables that has"):
        Options(from_=(tmp_path,)).request(())


def test_what_is_in_the_folder_of_results_is_taken_before_it_is_replaced(tmp_path):
    assert tmp_path in Options(to=tmp_path).request(()).sources


def test_the_command_of_a_table_has_what_was_asked_for(tmp_path):
    request = Request("smoke", [f"runs_dir={tmp_path}", "optim.lr=0.1"], seeds=3)
    plan = plan_table(load_table("table4", CONFIGS), request, print)
    assert plan.command == 'make table TABLE=table4 SCALE=smoke ARGS="--seeds 3 optim.lr=0.1"'


def test_nothing_finished_is_nothing_to_copy(tmp_path):
    with pytest.raises(ConfigError, match="no run of table4-smoke is finished"):
        save(runs_of("table4", tmp_path), tmp_path / "results")


def test_a_dotted_key_leads_to_a_number_or_to_none():
    tree = {"tasks": {"piqa": {"acc": 0.5, "name": "piqa"}}, "flag": True}
    assert look_up(tree, "tasks.piqa.acc") == 0.5
    assert look_up({"loss": math.nan}, "loss") is None, "a run that ends with NaN has failed"
    assert look_up({"texts": {"test.txt": {"perplexity": 30}}}, "texts.test.txt.perplexity") == 30.0
    assert [look_up(tree, key) for key in ("tasks.piqa.name", "tasks.race.acc", "flag", "tasks.piqa.acc.x")] == [
        None
    ] * 4


def test_the_data_of_a_run_are_those_of_its_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints/step=4.ckpt"
    folder.mkdir(parents=True)
    assert data_of(tmp_path) is None
    meta = {"config": "name: debug", "TextDataModule": {"consumed_samples": 32, "data": "abc", "seed": 1}}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert data_of(tmp_path) == "abc"


def test_no_report_is_made_over_runs_that_have_read_different_data(tmp_path):
    """The text behind data.path was edited between two calls. Earlier versions' states do not say what was read."""
    request = Request("smoke", [f"runs_dir={tmp_path}"], seeds=1)
    plan, said = plan_table(load_table("table4", CONFIGS), request, print), []
    for i, run in enumerate(plan.runs):
        finish(run)
        run.job.state.results |= {"data": (None, "old", "new", "new")[i]}
        run.job.keep()
    made = make_table(plan, request, Commands(lambda *words: 1, said.append))
    assert (made.finished, made.failed, made.files) == (4, 1, [])
    assert said[-1].endswith(f"remove {plan.runs[1].job.state_file}")
