"""The tables of configs/experiment build and hold the paper's values; mistakes are refused."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from experiments.tables.table_file import load_table
from experiments.tables.table_runs import plan_runs
from experiments.tables.table_speeds import share_of
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.training.assembly.model import build_model, build_model_on_meta

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs/experiment"
EXPERIMENTS = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*/table.yaml")])
TABLES = sorted(path.parent.name for path in CONFIGS.glob("*/table.yaml"))
BUILT: set[str] = set()  # tables share rows, and have rows that differ in their training only


@pytest.mark.parametrize("name", TABLES)
def test_every_row_builds_and_every_metric_is_made(name, tmp_path):
    table = load_table(name, CONFIGS)
    assert "smoke" in table.scales and len(table.scales) > 1
    keys = [key for metric in table.metrics_from("evaluation") for key in metric.keys]
    for scale in table.scales.values():
        runs = plan_runs(table, scale, tmp_path, 1)
        assert len({run.job.name for run in runs}) == len(table.rows)
        models = {
            repr((run.config.model, run.config.moe, run.config.data)): run.config for run in runs
        }
        for name in models.keys() - BUILT:
            build_model_on_meta(models[name])
        BUILT.update(models)
        if scale.evaluate is not None:
            given = dict(pairwise(scale.evaluate))
            made = [f"tasks.{task}." for task in given.get("--tasks", "").split(",")]
            assert keys and all(
                key.startswith((*made, f"texts.{given.get('--text')}.")) for key in keys
            )


PAPER = {  # the paper's tables, row by row in the order of the files
    "table1": {
        "accuracy": (79.33, 78.95, 79.53, 79.14, 79.38, 79.20),
        "training speed-up": (1, 1.27, 1.24, 1.36, 1.43, 1.49),
        "inference speed-up": (1, 1.39, 1.35, 1.54, 1.66, 1.82),
    },
    "table2": {
        "HellaSwag": (27.53, 27.23, 27.70, 28.40, 29.08, 29.09),
        "PIQA": (59.19, 59.09, 59.25, 60.07, 60.01, 60.55),
        "WinoGrande": (48.62, 51.22, 52.09, 50.83, 50.91, 51.38),
        "BoolQ": (59.72, 60.00, 60.76, 58.26, 60.92, 57.25),
        "ARC-E": (38.43, 38.85, 39.23, 38.72, 38.59, 38.89),
        "OBQA": (25.20, 26.60, 25.40, 24.60, 24.80, 26.40),
        "RACE": (23.83, 25.07, 24.98, 25.17, 25.45, 27.08),
        "MathQA": (20.37, 20.57, 20.10, 21.07, 20.80, 21.07),
        "average of eight": (37.86, 38.58, 38.69, 38.39, 38.82, 38.96),
        "training speed-up": (1, 1.04, 1.12, 1, 1.06, 1.14),
        "inference speed-up": (1, 1.06, 1.17, 1, 1.11, 1.21),
    },
    "table3": {
        "val_loss": (3.270405, 3.240592, 3.236811, 3.224763, 3.232943, 3.237530, 3.241349, 3.225626)
    },
    "table4": {
        "perplexity": (17.52, 16.46, 17.26, 16.27),
        "training speed-up": (1, 1.12, 0.94, 1.05),
        "inference speed-up": (1, 1.18, 0.92, 1.08),
    },
    "table5": {"accuracy": (79.53, 79.02, 79.14, 78.78, 79.38, 78.98, 79.20, 78.29)},
    "table6": {
        "accuracy": (
            *(79.33, 78.95, 79.53, 79.35, None, 78.45, 79.38),
            *(80.48, 80.05, 80.62, 80.51, 80.56),
        )
    },
    "table7": {"zero-shot perplexity": (31.60, 29.15, 31.52, 29.10, 19.18, 17.94, 18.91, 17.62)},
}


@pytest.mark.parametrize("name", PAPER)
def test_a_table_has_the_papers_values(name):
    rows = load_table(name, CONFIGS).rows
    for metric, values in PAPER[name].items():
        assert tuple(row.paper.get(metric) for row in rows) == values


@pytest.mark.parametrize("name", ("table1", "table2", "table3", "table4", "table7"))
def test_rows_begin_with_the_same_weights(name, tmp_path):
    """All weights of a baseline are in every row that is compared with it, with equal values; rows
    only add modules."""
    table = load_table(name, CONFIGS)
    runs = plan_runs(table, table.scales["smoke"], tmp_path, 2)
    *first_seed, second = [
        build_model(run.config).state_dict() for run in runs[: len(table.rows) + 1]
    ]
    of_row = dict(zip([row.name for row in table.rows], first_seed, strict=True))
    for row in table.rows:
        first, other = of_row[row.baseline], of_row[row.name]
        assert first.keys() <= other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in first.items())
        added = [set(key.split(".")) for key in other.keys() - first.keys()]
        assert all(
            parts & {"shared_expert", "coefficient", "tap_norm", "tap_router"} for parts in added
        )
    gate = next(key for key in second if key.endswith("router.gate.weight"))
    assert not torch.equal(first_seed[0][gate], second[gate]), "seeds have different weights"
    assert len({run.config.data for run in runs}) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("baseline: top-2", "baseline: top-3"), "baseline is 'top-3', allowed: 'top-2'"),
        (
            ("val_loss: 3.270405", "val_loss: best"),
            "paper of 'top-2'.val_loss is 'best', allowed: a number",
        ),
        (
            ("val_loss: 3.270405", "loss: 3.27"),
            "unknown key 'loss' in paper of 'top-2', .*allowed: val_loss",
        ),
        (("seeds: 2", "seeds: 0"), "seeds is '0', allowed: 1 or more"),
        (("    paper: {val_loss: 3.240592}\n", ""), "a row.paper is missing"),
        (
            ("from: summary", "from: memory"),
            "metrics.val_loss.from is 'memory', allowed: summary | curve | evaluation",
        ),
        (("from: summary", "from: speed, key: train_speedup"), "val_loss is first and a speed"),
        (
            ("[0.15, 0.52]", "[0.15, 52]"),
            "equal_time is .*'52'.*, allowed: a list of numbers between 0 and 1",
        ),
        (("speed: top2", "baseline: top-3"), "baseline of 'top-2' is 'top-3', allowed: 'top-2'"),
        (
            ("setting: top-2", "setting: B"),
            "setting of 'top-2' is 'B', allowed: top-2, shared-expert, ScMoE at scale",
        ),
        (
            ("minutes: 0.5", "otherwise: digits"),
            "scales.smoke.otherwise is 'digits', allowed: smoke, small",
        ),
        (
            ("bench: --level iteration", "bench: --level 'iteration"),
            "table.yaml: No closing quotation",
        ),
        (("name: ScMoE Pos-1, CG-1", "name: ScMoE Pos 2 CG 1"), "same name"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path, change, says):
    text = (CONFIGS / "table3/table.yaml").read_text()
    assert change[0] in text
    (tmp_path / "table3").mkdir()
    (tmp_path / "table3/table.yaml").write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError, match=says.replace("|", r"\|")):
        load_table("table3", tmp_path)


def test_the_papers_averages_of_table2_are_those_of_its_tasks():
    tasks = ("HellaSwag", "PIQA", "WinoGrande", "BoolQ", "ARC-E", "OBQA", "RACE", "MathQA")
    six = [task for task in tasks if task not in ("HellaSwag", "RACE")]
    for row in load_table("table2", CONFIGS).rows:
        assert row.paper["average of eight"] == pytest.approx(
            sum(map(row.paper.get, tasks)) / 8, abs=0.006
        )
        assert row.paper["average of six"] == pytest.approx(
            sum(map(row.paper.get, six)) / 6, abs=1e-4
        )


def test_table3_trains_as_the_paper_does():
    table = load_table("table3", CONFIGS)
    small = load_config(table.scales["small"].config)
    assert table.scales["small"].seeds >= 5
    assert small.trainer.max_steps * small.data.global_batch_size * small.data.seq_len >= 4e6
    assert (small.moe.capacity_factor, small.moe.load_balance_coef) == (2.0, 0.01)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_an_experiment_opens_with_the_papers_values_its_command_and_its_cost(path):
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head is not None
    found = re.findall(r"^#   (paper|command|cost)  +\S", head[0], re.MULTILINE)
    assert found == ["paper", "command", "cost"]
    assert re.search(r"\d\.\d|\d{2}\.\d", head[0])


def test_the_registered_experiment_compares_the_loss_that_was_registered():
    decision = (ROOT / "docs/decisions/0047-quality.md").read_text(encoding="utf-8")
    compared = load_table("quality", CONFIGS).decides.name
    assert f"**The loss that is compared is the {compared}**" in decision


def test_a_share_is_read_back_from_the_name_of_its_file(tmp_path):
    text = (CONFIGS / "table3/table.yaml").read_text()
    (tmp_path / "table3").mkdir()
    changed = text.replace("[0.15, 0.52]", "[0.3333333, 0.52]", 1)
    (tmp_path / "table3/table.yaml").write_text(changed)
    for share in load_table("table3", tmp_path).equal_time:
        assert share_of(Path(f"overlap-share-{share:g}.json")) == share


def test_more_shares_than_the_chart_has_colours_are_refused(tmp_path):
    text = (CONFIGS / "table3/table.yaml").read_text()
    (tmp_path / "table3").mkdir()
    changed = text.replace("[0.15, 0.52]", "[0.1, 0.15, 0.3, 0.52]", 1)
    (tmp_path / "table3/table.yaml").write_text(changed)
    with pytest.raises(ConfigError, match="at most 3"):
        load_table("table3", tmp_path)


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        (", key: train_speedup", r"training speed-up.key is .*train_speedup"),
        ("share: 0.52\n", "share is missing"),
    ],
)
def test_a_metric_of_speed_names_a_speed_and_a_share_of_the_testbed(removed, says, tmp_path):
    text = (CONFIGS / "table1/table.yaml").read_text()
    assert removed in text
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1/table.yaml").write_text(text.replace(removed, "", 1))
    with pytest.raises(ConfigError, match=says):
        load_table("table1", tmp_path)
