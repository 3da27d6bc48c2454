"""The name of a run's directory shows how the run differs from others; what is needed to run it
again is kept."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scmoe.config.installation import scmoe
from scmoe.runs.evaluate.evaluation import keep_results, read_results
from scmoe.training.run import directory
from scmoe.training.run.directory import SLUG_CHARS, create_run_dir, environment, slug_of
from scmoe.training.run.loggers import csv_logger
from scmoe.training.run.resume import set_aside_later
from tests.support.commands import rows_of

LONG = [
    f"moe.{key}=0.12345"
    for key in ("capacity_factor", "load_balance_coef", "z_loss_coef", "dropless_ceiling")
]


def test_a_run_starts_in_a_tree_with_a_change_that_is_not_utf8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a"]
    Path("latin.txt").write_text("a\n")
    for command in (["init", "-q"], ["add", "latin.txt"], ["commit", "-qm", "before"]):
        subprocess.run([*git, *command], check=True)
    Path("latin.txt").write_bytes(b"\xe9\n")
    run_dir = create_run_dir(tmp_path / "runs", "a", [], "")
    assert "\n-a\n+\ufffd" in json.loads((run_dir / "env.json").read_text())["git_diff"]


@pytest.mark.parametrize("obstacle", ["a copied folder", "a file system without links"])
def test_a_run_starts_where_latest_cannot_be_a_link(obstacle, tmp_path, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if obstacle == "a copied folder":
        (tmp_path / "latest").mkdir()
        (tmp_path / "latest/config.yaml").write_text("name: copied")
    else:
        monkeypatch.setattr(os, "symlink", refuse)
    run_dir = create_run_dir(tmp_path, "a", [], "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'latest'}") and str(run_dir) in line
    assert not list(tmp_path.glob(".latest-*"))


@pytest.mark.parametrize(
    ("overrides", "slug"),
    [
        ([], ""),
        (["strategy.ep_size=2", "--optim.lr=1e-3"], "ep_size-2-lr-1e-3"),
        (
            ["trainer.max_steps=20", "moe.architecture=shared_expert"],
            "architecture-shared_expert-max_steps-20",
        ),
        (
            [
                "name=a",
                "runs_dir=/b",
                "logger.mode=disabled",
                "trainer.progress=false",
                "data.cache_dir=/c",
            ],
            "",
        ),
        (["seed=1", "seed=2"], "seed-2"),
    ],
)
def test_a_slug_is_keys_and_values(overrides, slug):
    assert slug_of(overrides) == slug


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([*LONG, "strategy.ep_size=1"], [*LONG, "strategy.ep_size=2"]),
        (["data.path=" + "x" * 100], ["data.path=" + "x" * 101]),
        (["data.path=a/b"], ["data.path=a-b"]),
        (["data.path=a b"], ["data.path=a/b"]),
        (["data.path=\N{GREEK SMALL LETTER ALPHA}"], ["data.path=\N{GREEK SMALL LETTER BETA}"]),
    ],
)
def test_runs_that_differ_have_different_names(one, other):
    assert slug_of(one) != slug_of(other)


@given(
    st.lists(st.tuples(st.sampled_from(["data.path", "init_from", "seed"]), st.text()), max_size=4)
)
def test_a_slug_is_short_and_safe(pairs):
    slug = slug_of([f"{key}={value}" for key, value in pairs])
    assert len(slug.encode()) <= SLUG_CHARS + 9
    assert not set(slug) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")


def test_two_runs_of_one_second_have_two_directories(tmp_path):
    dirs = {
        create_run_dir(tmp_path, "a", overrides, "")
        for overrides in ([], [], ["seed=2"], ["seed=2"])
    }
    assert len(dirs) == 4
    assert (tmp_path / "latest").resolve() in dirs


def test_another_checkpoint_of_the_same_name_has_results_of_its_own(tmp_path):
    found = {"step": 4, "test": {}, "text": None, "tasks": {"piqa": 1}}
    for weights, tasks in (("a", {"piqa": 1}), ("a", {"next": 2}), ("b", {"next": 3})):
        keep_results(tmp_path, "step=4.ckpt", {**found, "tasks": tasks}, weights)
        kept = read_results(tmp_path)["step=4.ckpt"]["tasks"]
    assert kept == {"next": 3}, "the run was resumed from an earlier step"


def test_a_half_row_of_an_earlier_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,step,z\n1.0,0,2.0\n1.0,1,2.0\n1.0")
    kept = csv_logger(tmp_path, 1).experiment
    assert (
        rows_of(tmp_path / "metrics.csv") == [{"a": "1.0", "step": "0", "z": "2.0"}]
        and not kept.metrics
    )


def test_the_row_of_a_validation_that_is_done_again_is_not_kept(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss\n2,5.0,\n2,,6.0\n3,4.0,\n")
    csv_logger(tmp_path, 3)
    assert len(rows_of(tmp_path / "metrics.csv")) == 2
    csv_logger(tmp_path, 3, validates_again=True)
    assert rows_of(tmp_path / "metrics.csv") == [{"step": "2", "train/loss": "5.0"}]


def test_metrics_begin_with_step_tokens_and_losses_also_after_a_resumption(tmp_path):
    rows = (
        {"moe/load_max": 1.0, "train/loss": 4.0, "train/tokens": 64.0},
        {"val/loss": 4.0, "data/skipped": 0.0},
    )
    logger = csv_logger(tmp_path, None)
    for step, row in enumerate(rows):
        logger.log_metrics(row, step)
        logger.save()
    resumed = csv_logger(tmp_path, 1)
    resumed.log_metrics(rows[1], 1)
    resumed.save()
    first = ["step", "train/tokens", "train/loss", "val/loss"]
    (header, *_) = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.split(",") == [*first, "data/skipped", "moe/load_max"]
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["0", "1"]


def test_the_command_that_a_run_keeps_can_be_pasted(tmp_path):
    """A program that calls scmoe is started again from the kept command, and keeps the same."""
    code = "from scmoe.training.run import directory; print(directory.command_line())"
    words = (sys.executable, "-c", code, "a b", "it's")
    first = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    pasted = subprocess.run(["sh", "-c", first], capture_output=True, text=True, check=True)
    assert pasted.stdout == first


def test_a_run_keeps_the_command_of_scmoe_and_what_its_machine_has(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/scmoe/__main__.py", "train", "a b", "x=1"])
    kept = environment()
    assert kept["command"] == scmoe("train", "a b", "x=1")
    assert kept["memory_gib"] > 0 and kept["processor"]


def test_a_run_directory_is_written_in_utf_8_in_any_locale(tmp_path):
    """In the locale C without UTF-8 mode, Python decodes the command line's bytes as surrogates."""
    override = "logger.notes=größer →"
    code = (
        "import sys; from pathlib import Path; from scmoe.training.run.directory import"
        " create_run_dir;create_run_dir(Path(sys.argv[1]), 'x', sys.argv[2:], 'name: x')"
    )
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), override], check=True, env=env)
    (written,) = tmp_path.glob("x/*/overrides.txt")
    assert written.read_text(encoding="utf-8") == f"{override}\n"


def test_runs_that_are_started_at_the_same_time_have_a_directory_each(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "environment", dict)
    at_once = Barrier(8)

    def begin(number: int):
        at_once.wait()
        return [directory.create_run_dir(tmp_path, f"a{i}", ["seed=2"], "") for i in range(20)]

    with ThreadPoolExecutor(8) as pool:
        dirs = [path for paths in pool.map(begin, range(8)) for path in paths]
    assert len({*dirs}) == 160


def test_a_run_starts_where_its_experiment_s_folder_is_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    root = tmp_path / "runs"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "disk")
    run_dir = create_run_dir(root, "a", [], "name: a\n")
    assert (root / "latest").resolve() == run_dir.resolve()
    assert (root / "latest/config.yaml").read_text() == "name: a\n"


def test_what_is_later_is_set_aside_and_files_of_a_user_stay(tmp_path):
    mine = {"config-from-2.yaml", "config-from-mine.yaml"}
    for name in (*mine, "config-from-8.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "summary.json").write_text('{"steps": 8}')
    set_aside_later(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == mine | {"set-aside"}
