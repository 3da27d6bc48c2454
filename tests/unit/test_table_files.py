"""The tables of configs/experiment build, hold the paper's values and write launch files; mistakes are refused."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from scmoe.config.fields import Config, ConfigError
from scmoe.config.load import load
from scmoe.parallel.mesh import ParallelContext
from scmoe.studies.table.launch import write_launch_files
from scmoe.studies.table.rows import load_table
from scmoe.studies.table.runs import plan_runs
from scmoe.training.build.model import build_model, build_model_on_meta

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/experiment"
EXPERIMENTS = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*/table.yaml")])
TABLES = sorted(path.parent.name for path in CONFIGS.glob("*/table.yaml"))


@pytest.mark.parametrize("name", TABLES)
def test_every_row_builds_at_every_scale(name, tmp_path):
    table = load_table(name, CONFIGS)
    assert {"smoke", "small", "paper"} <= table.scales.keys()
    for scale in table.scales.values():
        runs = plan_runs(table, scale, tmp_path, scale.seeds)
        assert len({run.job.name for run in runs}) == len(table.rows) * scale.seeds
        for run in runs[: len(table.rows)]:
            build_model_on_meta(run.config)


def test_table3_is_the_papers():
    table = load_table("table3", CONFIGS)
    assert [row.paper for row in table.rows] == [
        *(3.270405, 3.240592, 3.236811, 3.224763, 3.232943, 3.237530, 3.241349, 3.225626)
    ]
    small = load(table.scales["small"].config)
    assert table.scales["small"].seeds >= 3
    assert small.trainer.max_steps * small.data.global_batch_size * small.data.seq_len >= 2e6
    assert (small.moe.capacity_factor, small.moe.load_balance_coef) == (2.0, 0.01)


def test_rows_begin_with_the_same_weights(tmp_path):
    """All weights of the first row are in every other row, with equal values; other rows only add modules."""
    table = load_table("table3", CONFIGS)
    runs = plan_runs(table, table.scales["smoke"], tmp_path, 2)
    weights = {run.job.name: build_model(run.config, ParallelContext()).state_dict() for run in runs}
    first, *others = (weights[run.job.name] for run in runs[: len(table.rows)])
    for other in others:
        assert first.keys() <= other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())
        assert {name.split(".")[2] for name in other.keys() - first.keys()} <= {
            *("shared_expert", "coefficient", "tap_norm")
        }
    name = "blocks.0.moe.router.gate.weight"
    assert not torch.equal(first[name], weights[runs[len(table.rows)].job.name][name]), "seeds have different weights"
    assert len({run.config.data for run in runs}) == 1


def test_an_unknown_table_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"table is 'table33', allowed: .*table3"):
        load_table("table33", CONFIGS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("baseline: top-2", "baseline: top-3"), "baseline is 'top-3', allowed: 'top-2'"),
        (("paper: 3.270405", "paper: best"), "paper is 'best', allowed: a number"),
        (("seeds: 2", "seeds: 0"), "seeds is '0', allowed: 1 or more"),
        (("    paper: 3.240592\n", ""), "a row.paper is missing, allowed: a number"),
        (("name: ScMoE Pos-1, CG-1", "name: ScMoE Pos 2 CG 1"), "same name"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, change, says):
    text = (CONFIGS / "table3/table.yaml").read_text()
    assert change[0] in text
    (tmp_path / "table3").mkdir()
    (tmp_path / "table3/table.yaml").write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError, match=says):
        load_table("table3", tmp_path)


def test_launch_files_hold_every_run(tmp_path):
    table = load_table("table3", CONFIGS)
    runs = plan_runs(table, table.scales["paper"], tmp_path, 1)
    for command in write_launch_files(runs):
        path = Path(command.removeprefix("bash "))
        subprocess.run(["bash", "-n", path], check=True)
        assert started(path, tmp_path) == [run.config for run in runs]


def started(script: Path, folder: Path) -> list[Config]:
    """Returns the configs that a launch file starts; fake torchrun and sbatch commands record their arguments."""
    calls = folder / "launched"
    calls.write_text("")
    for name in (".venv/bin/torchrun", "sbatch"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'#!/bin/bash\nprintf "%s\\n" "$CONFIG $*" >> {calls}\n')
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", script.absolute()], cwd=folder, env=environment, check=True)
    configs = []
    for call in calls.read_text().splitlines():
        (config,) = (word for word in call.split() if word.endswith(".yaml"))
        configs.append(load(config, [word for word in call.split() if "=" in word and not word.startswith("--")]))
    return configs


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_an_experiment_opens_with_the_papers_values_its_command_and_its_cost(path):
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head is not None
    found = re.findall(r"^#   (paper|command|cost)  +\S", head[0], re.MULTILINE)
    assert found == ["paper", "command", "cost"]
    assert re.search(r"\d\.\d|\d{2}\.\d", head[0])
