"""A sweep file's wrong settings and unknown keys are refused by name, and distributions give the
right values."""

import copy
import datetime
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.sweeps.sweep_file import DISTRIBUTIONS, read, read_axis
from tests.support.sweeps import GOOD

ROOT = Path(__file__).parents[2]
NO_CONFIG = ["${env}", "${interpreter}", "-m", "scmoe", "train", "${args_no_hyphens}"]
ENVIRONMENT = [*GOOD["command"][:6], "name=${envvar:HOME}", "${args_no_hyphens}"]
GROUP = [*GOOD["command"][:-1], "logger.group=mine", GOOD["command"][-1]]
SECTION = [*GOOD["command"][:-1], "optim={warmup_steps: 5, lr: 1e-3}", GOOD["command"][-1]]

# path of the changed setting, its new value (None: removed), and text that the refusal must contain
BAD = [
    ("method", "genetic", "method is 'genetic', allowed: grid | random | bayes"),
    ("method", None, "method is missing"),
    ("parameters", {}, "parameters is {}"),
    ("run_cap", 0, "run_cap is 0"),
    ("runcap", 3, "unknown key 'runcap', did you mean run_cap?"),
    ("name", "../x", "name is '../x'"),
    ("metric/name", None, "metric.name"),
    ("metric/gaol", "minimize", "unknown key 'gaol' in metric, did you mean goal?"),
    ("command", NO_CONFIG, "command is ["),
    ("command", GOOD["command"][:-1], "command is ["),
    ("command", ENVIRONMENT, "command is ["),
    ("command", SECTION, "parameters.optim.lr is in the command too"),
    ("command", GROUP, "logger.group is in the command, but the sweep sets it"),
    ("parameters/name", {"value": "a"}, "parameters.name is set by the sweep itself"),
    ("command", None, "command is missing. Give [scmoe, train, CONFIG"),
    ("parameters/optim.lr", 1e-3, "parameters.optim.lr is 0.001"),
    (
        "parameters/optim.lr",
        {"values": [1e-3], "value": 1},
        "unknown key 'values' in parameters.optim.lr",
    ),
    (
        "parameters/optim.lr",
        {"distribution": "uniform", "min": 0.1},
        "parameters.optim.lr.max is missing",
    ),
    ("parameters/optim.lr", {"min": "1e-4", "max": 1e-2}, "a number; YAML reads 1e-3 as a text"),
    ("parameters/optim.lr", {"min": 1e-2, "max": 1e-4}, "parameters.optim.lr.min is 0.01"),
    (
        "parameters/optim.lr",
        {"distribution": "log_uniform_values", "min": 0.0, "max": 1.0},
        "above 0",
    ),
    ("parameters/optim", {"parameters": {"lr": {"value": 1}}}, "'parameters' in parameters.optim"),
    ("parameters/optim.lrr", {"value": 1e-3}, "unknown key 'optim.lrr', did you mean optim.lr?"),
    (
        "parameters/trainer.max_steps",
        {"value": 5},
        "parameters.trainer.max_steps is in the command too",
    ),
]


def changed(path: str, value: object) -> dict:
    config = copy.deepcopy(GOOD)
    *folders, key = path.split("/")
    place = config
    for folder in folders:
        place = place[folder]
    place.pop(key, None)
    if value is not None:
        place[key] = value
    return config


def write(folder: Path, config: object) -> str:
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/sweep").glob("*.yaml")), ids=lambda path: path.name
)
def test_the_sweeps_of_this_project_can_be_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert read(str(path)).name == path.stem
    assert path.read_text().startswith("# ")


def test_a_good_file_is_read(tmp_path):
    sweep = read(write(tmp_path, GOOD), ["seed=3"])
    assert (sweep.name, sweep.metric, sweep.minimize, sweep.run_cap) == ("s", "val/loss", True, 3)
    assert sweep.overrides == ["trainer.max_steps=3", "seed=3"]
    assert sweep.config == GOOD["command"][5]
    assert sweep.raw["command"] == [*GOOD["command"][:-1], "seed=3", "${args_no_hyphens}"], (
        "for W&B's agent"
    )
    assert {**sweep.raw, "command": None} == {**GOOD, "command": None}, "no other key is changed"


@pytest.mark.parametrize(
    ("path", "value", "said"), BAD, ids=[f"{path} {value}"[:60] for path, value, _ in BAD]
)
def test_a_wrong_setting_is_refused_by_its_name(path, value, said, tmp_path):
    file = write(tmp_path, changed(path, value))
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert said in str(caught.value)
    assert str(caught.value).startswith(file)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "- a\n",
        "method: [\n",
        "name: 2026-99-99\n",
        "!!python/object/apply:os.getcwd []\n",
    ],
)
def test_a_file_that_is_not_a_sweep_is_refused(text, tmp_path):
    if text is not None:
        (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match="can be read" if text is None else "s.yaml"):
        read(str(tmp_path / "s.yaml"))


def test_a_grid_takes_no_continuous_distribution(tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.lr\.distribution is 'uniform', .* grid"):
        read(write(tmp_path, changed("method", "grid")))


def test_bayes_requires_a_metric(tmp_path):
    with pytest.raises(ConfigError, match="metric is missing"):
        read(write(tmp_path, {**changed("metric", None), "method": "bayes"}))


@pytest.mark.parametrize("is_in_file", [True, False])
def test_the_options_of_an_extension_can_be_searched(is_in_file, tmp_path):
    extension = "extensions=[docs.examples.my_architecture]"
    values = {"values": [1, 2]}
    config = changed("parameters", {"options.mine": values, "callbacks.surprise.every": values})
    if is_in_file:
        config["command"] = [*GOOD["command"][:-1], extension, "${args_no_hyphens}"]
    sweep = read(write(tmp_path, config), [] if is_in_file else [extension])
    assert [*sweep.axes] == ["options.mine", "callbacks.surprise.every"]


def test_the_command_may_be_scmoe_train_alone(tmp_path):
    sweep = read(write(tmp_path, {**GOOD, "command": ["scmoe", "train", *GOOD["command"][5:]]}))
    whole = read(write(tmp_path, GOOD))
    assert (sweep.config, sweep.overrides) == (whole.config, whole.overrides)


ONLY_AT_WANDB = (
    {"early_terminate": {"type": "hyperband", "min_iter": 3}},
    {"metric": {**GOOD["metric"], "impute": "best"}},
    {"parameters": {"optim.lr": {"distribution": "log_normal", "mu": -7, "sigma": 1}}},
    {"parameters": {"moe.combine": {"values": ["cg1", "cg2"], "probabilities": [0.9, 0.1]}}},
    {"command": ["${interpreter}", "${program}", *GOOD["command"][5:]]},
    {"command": ["torchrun", "-m", *GOOD["command"][3:]]},
    {"command": [*GOOD["command"][:-1], "${args}"]},
)


@pytest.mark.parametrize("change", ONLY_AT_WANDB, ids=str)
def test_what_only_wandb_can_run_is_sent_there_in_one_line(change, tmp_path, capsys):
    file = write(tmp_path, {**GOOD, **change})
    assert call("sweep", file, f"runs_dir={tmp_path / 'runs'}") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"run it at W&B: wandb sweep {file}" in said
    assert not (tmp_path / "runs").exists()


SPECS = {
    "int_uniform": {"min": -2, "max": 5},
    "uniform": {"min": -2.0, "max": 5.0},
    "log_uniform_values": {"min": 1e-4, "max": 10.0},
    "categorical": {"values": ["a", "b", "c"]},
    "constant": {"value": 7},
}
# the values at u = 0, 1/2, 1
ENDS = {
    "int_uniform": (-2, 2, 5),
    "uniform": (-2, 1.5, 5),
    "log_uniform_values": (1e-4, math.sqrt(1e-3), 10),
    "categorical": ("a", "b", "c"),
    "constant": (7, 7, 7),
}


def axis(kind: str):
    return read_axis("x", {"distribution": kind, **SPECS[kind]}, "random")


@pytest.mark.parametrize("kind", ENDS)
def test_quantiles_end_where_the_distribution_does(kind):
    assert SPECS.keys() == DISTRIBUTIONS.keys(), "every distribution is tested"
    values = [axis(kind).quantile(u) for u in (0.0, 0.5, 1.0)]
    assert values == [
        pytest.approx(end) if isinstance(end, (int, float)) else end for end in ENDS[kind]
    ]


@pytest.mark.parametrize("kind", ["int_uniform", "uniform", "log_uniform_values"])
@settings(max_examples=40)
@given(u=st.floats(0, 1), v=st.floats(0, 1))
def test_quantiles_keep_the_order(kind, u, v):
    a, b = (axis(kind).quantile(x) for x in sorted((u, v)))
    assert a <= b


def test_a_missing_distribution_is_inferred():
    for spec, kind in (
        ({"value": 1}, "constant"),
        ({"values": [1, 2]}, "categorical"),
        ({"min": 1, "max": 3}, "int_uniform"),
        ({"min": 1, "max": 3.0}, "uniform"),
    ):
        assert read_axis("x", spec, "random").distribution == kind


def test_a_date_is_refused():
    for spec in ({"value": datetime.date(2026, 1, 1)}, {"values": [datetime.date(2026, 1, 1)]}):
        with pytest.raises(ConfigError, match=r"options\.when has the date 2026-01-01"):
            read_axis("options.when", spec, "grid")
