"""A table refuses what would make its runs others than they say, and its jobs name what a kept run does not import."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load
from scmoe.experiments.studies.table.evaluations import Evaluations
from scmoe.experiments.studies.table.make import Request, plan_table
from scmoe.experiments.studies.table.rows import load_table
from scmoe.experiments.studies.table.table_runs import plan_runs

CONFIGS = Path(__file__).parents[2] / "configs/experiment"


@pytest.mark.parametrize(
    ("name", "scale", "override"),
    [
        ("table6", "digits", "model.dim=32"),  # a row of the model B would be one of the model S, under its old name
        *(("table3", "small", override) for override in ("optim.lr=1e-3", "moe.top_k=2", "seed=3")),
    ],
)
def test_an_override_of_what_a_row_or_its_setting_sets_is_refused(name, scale, override, tmp_path):
    table = load_table(name, CONFIGS)
    with pytest.raises(ConfigError, match=f"{override} is given, allowed: keys other than"):
        plan_runs(table, table.scales[scale], tmp_path, 1, [override])


def test_runs_of_several_ranks_need_processes(tmp_path):
    request = Request("smoke", ["trainer.devices=2", f"runs_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="--jobs is 0, allowed for runs of several ranks: 1 or more"):
        plan_table(load_table("table3", CONFIGS), request, print)
    assert plan_table(load_table("table3", CONFIGS), replace(request, jobs=1), print).jobs == 1


def test_the_runs_of_a_table_are_a_group_of_wandb_unless_another_is_named(tmp_path):
    table = load_table("table3", CONFIGS)
    for words, group in (([], "table3-smoke"), (["logger.group=mine"], "mine")):
        run = plan_runs(table, table.scales["smoke"], tmp_path / "table3-smoke", 1, words)[0]
        assert run.config.logger.group == load(run.job.arguments[0], run.job.arguments[1:]).logger.group == group


def test_a_run_with_extensions_is_resumed_and_evaluated_with_them(tmp_path):
    """What is kept in a run imports nothing, so the commands name the modules and callbacks again."""
    words = ["extensions=[docs.examples.my_architecture]", "callbacks.surprise.every=3"]
    table = load_table("table7", CONFIGS)
    run = plan_runs(table, table.scales["smoke"], tmp_path, 1, words)[0]
    assert run.job.command(tmp_path / "run")[-3:] == [str(tmp_path / "run"), *words]
    evaluations = Evaluations(table, replace(table.scales["small"], evaluate=("--tasks", "none")))
    assert words[0] in evaluations.job(run).arguments and words[1] not in evaluations.job(run).arguments
