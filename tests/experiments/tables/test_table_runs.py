"""Runs of a table differ only in their model, and their results are kept."""

import errno
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.tables.table_file import TableOptions, TableRow, load_table
from experiments.tables.table_plan import plan_table
from experiments.tables.table_runs import (
    Run,
    data_of,
    finished,
    look_up,
    plan_runs,
    read_states,
    same_config,
    save,
)
from scmoe import files
from scmoe.config.as_yaml import to_yaml
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.sweeps.jobs import State, config_digest

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs/experiment"
DEBUG = ROOT / "configs/debug.yaml"


def runs_of(
    name: str, folder: Path, *overrides: str, scale: str = "smoke", seeds: int = 1
) -> list[Run]:
    table = load_table(name, CONFIGS)
    return plan_runs(
        table, table.scales[scale], folder / f"tables/{name}-{scale}", seeds, overrides
    )


def finish(runs: list[Run]) -> None:
    for run in runs:
        run.job.state = State(
            "finished", "/somewhere", 9.0, 1.0, results={"digest": run.digest, "summary": {}}
        )
        run.job.keep()


@pytest.mark.parametrize(
    ("name", "scale", "override"),
    [
        (
            "table6",
            "digits",
            "model.dim=32",
        ),  # a row of the model B would be one of the model S, under its old name
        ("table4", "smoke", "--name=mine"),
        *(("table3", "small", override) for override in ("optim.lr=1e-3", "moe.top_k=2", "seed=3")),
        ("table3", "small", "optim={lr: 1e-3}"),
    ],
)
def test_an_override_of_what_a_row_or_its_setting_sets_is_refused(name, scale, override, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"{override} is given, but the table sets")):
        runs_of(name, tmp_path, override, scale=scale)


def test_a_row_may_differ_from_others_in_its_model_learning_rate_and_options(tmp_path, monkeypatch):
    monkeypatch.setattr("scmoe.config.rules._extensions", lambda config: ())
    table = load_table("table3", CONFIGS)
    scale = replace(table.scales["smoke"], config=DEBUG, settings={})

    def plan(*overrides: str) -> list[Run]:
        rows = (
            TableRow("top-2", ("a",), {}, (), "top-2"),
            TableRow("other", ("a",), {}, overrides, "top-2"),
        )
        return plan_runs(replace(table, rows=rows), scale, tmp_path, 1)

    configs = [run.config for run in plan("optim.lr=0.02", "options.routers=4")]
    assert [(config.optim.lr, config.options) for config in configs] == [
        (1e-3, {}),
        (0.02, {"routers": 4}),
    ]
    with pytest.raises(ConfigError, match=r"row 'other' sets data.seq_len"):
        plan("data.seq_len=32")


def test_a_setting_holds_at_its_own_scale(tmp_path):
    rates = {
        scale: {
            run.row.name: run.config.optim.lr for run in runs_of("table3", tmp_path, scale=scale)
        }
        for scale in ("small", "smoke")
    }
    assert rates["small"]["top-2"] == 6e-3 and rates["small"]["ScMoE Pos-2, CG-1"] == 1.2e-2
    assert len(set(rates["smoke"].values())) == 1


def test_the_runs_of_a_table_are_a_group_of_wandb_unless_another_is_named(tmp_path):
    for words, group in (([], "table3-smoke"), (["logger.group=mine"], "mine")):
        run = runs_of("table3", tmp_path, *words)[0]
        assert (
            run.config.logger.group
            == load_config(run.job.arguments[0], run.job.arguments[1:]).logger.group
            == group
        )


def test_a_field_that_is_newer_than_the_run_counts_unless_it_is_at_its_default(tmp_path):
    config = load_config(DEBUG)
    (tmp_path / "config.yaml").write_text(
        "".join(line for line in to_yaml(config).splitlines(True) if "z_loss_coef" not in line)
    )
    assert same_config(tmp_path, config)
    assert same_config(tmp_path, load_config(DEBUG, ["logger.group=another"])), "the same training"
    assert same_config(tmp_path, load_config(DEBUG, ["trainer.progress=false"]))
    assert not same_config(tmp_path, load_config(DEBUG, ["moe.z_loss_coef=0.1"]))


def test_only_values_that_can_change_a_result_change_the_digest():
    own = config_digest(load_config(DEBUG))
    for override in ("optim.lr=0.5", "seed=2", "data.seq_len=32", "moe.top_k=2"):
        assert config_digest(load_config(DEBUG, [override])) != own, override
    for override in ("name=other", "runs_dir=elsewhere", "logger.mode=auto", "data.cache_dir=tmp"):
        assert config_digest(load_config(DEBUG, [override])) == own, override


def test_results_and_states_of_finished_runs_are_copied(tmp_path):
    runs = runs_of("table4", tmp_path / "here")
    finish(runs[:3])
    (runs[0].job.study / "results.json").write_text('{"rows": [{"run_dirs": ["/somewhere"]}]}')
    (runs[0].job.study / "table.md").write_text("# Table 4")
    folder = save(runs, tmp_path / "results")
    assert folder == tmp_path / "results/table4-smoke"
    assert json.loads((folder / "results.json").read_text()) == {"rows": [{"run_dirs": []}]}
    states = [json.loads(path.read_text()) for path in (folder / "states").iterdir()]
    assert [state["run_dir"] for state in states] == [None] * 3, "directories stay on this machine"


def full_disk(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_results_of_other_runs_are_not_overwritten(tmp_path, monkeypatch):
    to = tmp_path / "results"

    def plan(home: str, seeds: int, *overrides: str) -> list[Run]:
        words = [f"runs_dir={tmp_path / home}", *overrides]
        return plan_table(
            load_table("table4", CONFIGS), TableOptions(seeds=seeds, to=to), words
        ).runs

    def make(runs: list[Run], loss: float) -> None:
        for run in runs:
            results = {"digest": run.digest, "summary": {"loss": loss}}
            run.job.state = State("finished", "/somewhere", results=results)
            run.job.keep()
        (runs[0].job.study / "results.json").write_text('{"rows": []}')
        (runs[0].job.study / "table.md").write_text("# Table 4")
        save(runs, to)

    runs = plan("here", 2)
    make(runs, 3.0)
    with pytest.raises(ConfigError, match=r"seed2, which would be missing .* Give more --seeds"):
        plan("here", 1)
    with pytest.raises(ConfigError, match="results of another configuration"):
        plan("here", 2, "optim.lr=0.1")
    with pytest.raises(ConfigError, match=r"has a run .* Copy the states/"):
        plan("elsewhere", 3)
    elsewhere = tmp_path / "elsewhere/tables/table4-smoke"
    shutil.copytree(to / "table4-smoke/states", elsewhere / "states")
    read_states(more := plan("elsewhere", 3))
    assert len(finished(more)) == len(runs), "the runs of two seeds are not made again"
    make(three := plan("here", 3), 3.0)
    before = {path.name: path.read_text() for path in (to / "table4-smoke/states").iterdir()}
    (three[0].job.study / "results.json").write_text('{"rows": [], "later": true}')
    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(three, to)
    for path in (to / "table4-smoke/states").iterdir():
        assert path.read_text() == before[path.name]
    assert "later" not in (to / "table4-smoke/results.json").read_text()
    (to / "table4-smoke/states" / next(iter(before))).write_text("{")
    with pytest.raises(ConfigError, match=r"is not whole\. Remove it"):
        plan("here", 3)
    assert len([*(to / "table4-smoke/states").iterdir()]) == len(more)


def test_a_dotted_key_leads_to_a_number_or_to_none():
    tree = {"tasks": {"piqa": {"acc": 0.5, "name": "piqa"}}, "flag": True}
    assert look_up(tree, "tasks.piqa.acc") == 0.5
    assert look_up({"loss": math.nan}, "loss") is None, "a run that ends with NaN has failed"
    assert look_up({"texts": {"test.txt": {"perplexity": 30}}}, "texts.test.txt.perplexity") == 30.0
    for key in ("tasks.piqa.name", "tasks.race.acc", "flag", "tasks.piqa.acc.x"):
        assert look_up(tree, key) is None


def test_the_data_of_a_run_are_those_of_its_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints/step=4.ckpt"
    folder.mkdir(parents=True)
    assert data_of(tmp_path) is None
    meta = {
        "config": "name: debug",
        "TextDataModule": {"consumed_samples": 32, "data": "abc", "seed": 1},
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    assert data_of(tmp_path) == "abc"
