"""States, curves and differences are read from run directories, and runs are listed and compared by
them."""

import json
import os
import platform
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from scmoe.command_line import call
from scmoe.config.as_yaml import to_yaml
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.runs import compare
from scmoe.runs import seen as runs
from scmoe.runs.seen import SeenRun
from scmoe.training.run.directory import (
    SILENT_S,
    process_start,
    read_state,
    refuse_running,
    show_life,
    write_state,
)
from tests.support.pictures import assert_readable

ROOT = Path(__file__).parents[2]
METRICS = """step,train/loss,val/loss,time/tokens_per_s
0,5.0,,
1,4.0,,100.0
1,,4.5,
3,3.0,,300.0
3,,4.25,
"""


@cache
def config_text(*overrides: str) -> str:
    return to_yaml(load_config(ROOT / "configs/debug.yaml", overrides))


def make_run(folder: Path, name: str, *overrides: str, state: str = "finished") -> Path:
    """Write the directory of a run of configs/debug.yaml (batches of 4 x 16 tokens), as a training
    does."""
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config_text(*overrides))
    (run_dir / "overrides.txt").write_text("".join(f"{word}\n" for word in overrides))
    (run_dir / "metrics.csv").write_text(METRICS)
    write_state(run_dir, state)
    return run_dir


@pytest.fixture
def folder(tmp_path):
    make_run(tmp_path, "debug/20261101-120000-a")
    make_run(tmp_path, "debug/20261101-120001-b", "moe.position=pos3", state="failed")
    make_run(tmp_path, "debug/20261101-120002-c", "optim.lr=0.5")
    for i, lr in enumerate(("0.1", "0.2")):
        make_run(tmp_path, f"sweeps/lr/trial-00{i}/20261101-1100{i}0-e", f"optim.lr={lr}")
    make_run(tmp_path, "other/20261101-120003-d", "model.dim=64")
    (tmp_path / "latest").symlink_to("other/20261101-120003-d")
    return tmp_path


def change_state(run_dir: Path, **changes: object) -> None:
    path = run_dir / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_state_is_what_was_written_while_the_process_lives(tmp_path):
    assert read_state(tmp_path) == "cut"
    (tmp_path / "summary.json").write_text("{}")
    assert read_state(tmp_path) == "finished", "without a state"
    for state in ("finished", "failed", "cut", "running"):
        write_state(tmp_path, state)
        assert read_state(tmp_path) == state


def test_a_killed_run_is_cut(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for change in (
        {"pid": ended.pid},
        {"started": "0"},
    ):  # no such process; another process of this id
        write_state(tmp_path, "running")
        change_state(tmp_path, **change)
        assert read_state(tmp_path) == "cut"


def test_a_run_that_another_process_trains_cannot_be_resumed(tmp_path):
    write_state(tmp_path, "running")
    refuse_running(tmp_path)  # this process itself, as in a notebook
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        change_state(tmp_path, pid=other.pid, started=process_start(other.pid))
        with pytest.raises(ConfigError, match=f"{other.pid} is training {tmp_path}"):
            refuse_running(tmp_path)
        change_state(tmp_path, state="cut")
        refuse_running(tmp_path)
        change_state(tmp_path, state="running")
        other.communicate(b"\n")
    refuse_running(tmp_path)  # it has ended


# a container may have the host's name
@pytest.mark.parametrize("host", ["elsewhere", platform.node()])
def test_a_run_that_another_machine_trains_cannot_be_resumed_until_it_is_silent(tmp_path, host):
    write_state(tmp_path, "running")
    # its process is not visible here
    change_state(tmp_path, host=host, machine="0123abcd", pid=2**22 + 1)
    assert read_state(tmp_path) == "running"
    with pytest.raises(ConfigError, match=f"on {host}"):
        refuse_running(tmp_path)
    silent_since = time.time() - SILENT_S - 60
    os.utime(tmp_path / "state.json", (silent_since, silent_since))
    assert read_state(tmp_path) == "cut"
    refuse_running(tmp_path)


def test_files_that_a_crash_has_cut_count_as_missing(folder, capsys):
    run = runs.open_run("latest", folder)
    for cut in ("", '{"state": "runn'):
        (run.path / "summary.json").write_text(cut)
        (run.path / "state.json").write_text(cut)
        refuse_running(run.path)
        assert (run.state, runs.SeenRun(run.path).summary) == ("finished", {})
    assert call("runs", str(folder)) == 0
    assert "6 of 6 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other",
    [
        {"pid": 1},
        {"state": "paused"},
        {"state": "running"},
        {"state": "running", "pid": "1", "host": "a"},
    ],
    ids=str,
)
def test_a_state_of_another_form_counts_as_missing(folder, capsys, other):
    run = runs.open_run("latest", folder)
    (run.path / "state.json").write_text(json.dumps(other))
    (run.path / "summary.json").unlink(missing_ok=True)
    refuse_running(run.path)
    assert run.state == "cut"
    assert call("runs", str(folder)) == 0
    assert "6 of 6 runs" in capsys.readouterr().out


def test_a_living_run_touches_its_state(tmp_path, monkeypatch):
    monkeypatch.setattr("scmoe.training.run.directory.BEAT_S", 0.01)
    write_state(tmp_path, "running")
    os.utime(tmp_path / "state.json", (0, 0))
    ended = show_life(tmp_path)
    while (tmp_path / "state.json").stat().st_mtime == 0:
        time.sleep(0.01)
    ended.set()


def test_a_process_that_has_ended_counts_as_gone_before_its_parent_asks():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(ended.pid) is None
    ended.wait()


def test_curves_are_over_tokens(folder):
    run = runs.open_run("latest", folder)
    assert run.path.name == "20261101-120003-d"
    assert run.curve("train/loss") == [(64.0, 5.0), (128.0, 4.0), (256.0, 3.0)]
    assert run.curve("val/loss") == [(128.0, 4.5), (256.0, 4.25)]
    assert (run.steps, run.best_loss, run.per_s) == (4, 4.25, 300.0)


@pytest.mark.parametrize("half", ["4,2", "4,2.5,,1e-", "4,2.5,,10.0,4,2"])
def test_half_a_row_is_left_out(half, folder):
    run = runs.open_run("latest", folder)
    (run.path / "metrics.csv").write_text(METRICS + half)
    assert (run.steps, run.best_loss, run.per_s) == (4, 4.25, 300.0)
    assert call("runs", str(folder)) == 0


def test_a_run_on_images_counts_images(folder):
    run_dir = make_run(folder, "vision/20261101-120004-v")
    text = (run_dir / "config.yaml").read_text()
    assert "name: synthetic" in text
    (run_dir / "config.yaml").write_text(text.replace("name: synthetic", "name: digits"))
    (run_dir / "metrics.csv").write_text(METRICS.replace("tokens_per_s", "images_per_s"))
    run = runs.open_run(str(run_dir))
    assert run.curve("val/loss") == [(8.0, 4.5), (16.0, 4.25)]
    assert (run.counts, run.per_s) == ("images", 300.0)


def test_a_run_on_images_of_an_extension_counts_images(folder):
    run_dir = make_run(folder, "vision/20261101-120004-v")
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("name: synthetic", "name: my_pictures"))
    head, *rows = METRICS.replace("tokens_per_s", "images_per_s").splitlines()
    with_amounts = [f"{head},train/images", *(f"{row},8" for row in rows)]
    (run_dir / "metrics.csv").write_text("\n".join(with_amounts) + "\n")
    run = runs.open_run(str(run_dir))
    assert run.curve("val/loss") == [(8.0, 4.5), (16.0, 4.25)]
    assert (run.counts, run.per_s) == ("images", 300.0)


def test_a_run_shows_itself_in_a_line_and_in_a_notebook(folder):
    run = runs.open_run("latest", folder)
    for shown in (repr(run), run._repr_html_()):
        assert all(fact in shown for fact in (run.path.name, run.state, "4.25", "300"))
    assert "no longer there" in repr(runs.SeenRun(folder / "gone"))
    evil = make_run(folder, "x/20261201-120004-<b>")
    assert "<b>" not in runs.SeenRun(evil)._repr_html_()


def test_runs_are_listed_with_what_differs_in_their_experiment(folder, capsys):
    assert call("runs", str(folder)) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if "20261101" in line]
    names = [line[0].rpartition("-")[2] for line in lines]
    assert names == ["d", "c", "b", "a", "e", "e"], (
        "the newest is first, and the link `latest` is not listed"
    )
    assert [line[1] for line in lines[:4]] == ["finished", "finished", "failed", "finished"]
    assert all(line[2:5] == ["4/4", "4.2500", "300"] for line in lines[:4])
    words = [[], ["optim.lr=0.5"], ["moe.position=pos3"], [], ["optim.lr=0.2"], ["optim.lr=0.1"]]
    assert [line[7:] for line in lines] == words, (
        "where two runs differ, neither value is the usual one"
    )
    assert "6 of 6 runs" in out
    assert call("runs", str(folder), "--last", "1") == 0
    assert "1 of 6 runs" in capsys.readouterr().out
    assert call("runs", str(folder / "sweeps/lr")) == 0
    assert "optim.lr=0.1" in capsys.readouterr().out, (
        "a list that starts inside the sweep shows it too"
    )


def test_a_run_whose_config_lacks_a_key_is_compared_by_its_default(folder):
    old = make_run(folder, "debug/20261101-110000-old")
    text = (old / "config.yaml").read_text()
    assert "z_loss_coef" in text
    lines = [line for line in text.splitlines(True) if "z_loss_coef" not in line]
    (old / "config.yaml").write_text("".join([*lines, "gone: 1\n"]))
    both = [
        runs.open_run("debug/20261101-110000-old", folder),
        runs.open_run("debug/20261101-120000-a", folder),
    ]
    assert runs.differences(both) == {}


def test_runs_are_compared(folder, capsys):
    names = [str(folder / "debug" / name) for name in ("20261101-120000-a", "20261101-120001-b")]
    picture = folder / "pictures/compare.png"
    assert call("compare", *names, "--out", str(picture)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    (line,) = [line.split() for line in out.splitlines() if "moe.position" in line]
    assert line == ["moe.position", "pos2", "pos3"]
    seen = [runs.open_run(name) for name in names]
    assert compare.run_labels(seen, "ab") == [
        "a: debug (position pos2)",
        "b: debug (position pos3)",
    ]
    assert call("compare", names[0], names[0], "--out", str(picture)) == 0
    assert "the configs are the same" in capsys.readouterr().out


def test_every_run_of_a_comparison_is_seen(folder, tmp_path, monkeypatch):
    """Curves that are equal do not hide each other, a curve of one point has a dot, and the legend
    is not cut off."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    changed = (
        "trainer.max_steps=4000",
        "optim.warmup_steps=1000",
        "data.global_batch_size=8",
        "data.workers=1",
    )
    run = make_run(
        folder,
        "debug/20261101-120005-f",
        "name=a_comparison_of_runs",
        *changed,
        "moe.position=pos3",
    )
    (run / "metrics.csv").write_text("".join(METRICS.splitlines(keepends=True)[:2]))
    seen = [runs.open_run(str(path)) for path in (folder / "latest", folder / "latest", run)]
    compare.draw(seen, compare.run_labels(seen, "abc"), tmp_path / "c.png")
    assert_readable(figures[0])
    first, twin, short = figures[0].axes[0].lines
    assert (
        first.get_xydata() == twin.get_xydata()
    ).all() and first.get_linestyle() != twin.get_linestyle()
    assert len(short.get_xydata()) == 1 and short.get_marker() == "o"


def test_what_schedules_gain_over_sequential_transfers_is_said_where_nothing_else_differs(
    tmp_path, capsys
):
    two_ranks = "trainer.devices=2"
    words = ("schedule.transfers=sequential", "schedule.batches_in_flight=2", "moe.position=pos3")
    names = [str(make_run(tmp_path, f"debug/{i}", two_ranks, word)) for i, word in enumerate(words)]
    faster = METRICS.replace("300.0", "450.0")
    (Path(names[1]) / "metrics.csv").write_text(faster)
    assert call("compare", *names, "--out", str(tmp_path / "a.png")) == 0
    said = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "sequential" in line and " x " in line
    ]
    assert said == ["b has 1.50 x the tokens/s of a, whose transfers are sequential"]


def test_a_run_without_metrics_can_be_compared_and_has_the_steps_that_are_saved(folder):
    cut = make_run(folder, "debug/20261101-130000-cut", state="cut")
    os.remove(cut / "metrics.csv")
    for name in ("9", "8-v1", "last"):
        (cut / f"checkpoints/step={name}.ckpt").mkdir(parents=True)
    assert runs.open_run(str(cut)).steps == 9
    assert call("compare", str(cut), str(folder / "latest"), "--out", str(folder / "c.png")) == 0


def test_what_would_show_nothing_is_refused(folder, capsys):
    for words, says in (
        (["runs", str(folder), "--last", "0"], "--last"),
        (["compare", str(folder / "latest"), "--out", str(folder / "c.png")], "two or more runs"),
    ):
        assert call(*words) == 2
        said = capsys.readouterr()
        assert says in said.err and len(said.err.splitlines()) == 1 and not said.out


@pytest.mark.parametrize("verb", ["resume", "export"])
def test_a_folder_that_is_no_run_is_named_as_what_it_is(verb, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    for name, says in (
        ("nowhere", "no folder"),
        ("hf", "Hugging Face"),
        ("", "no whole last checkpoint"),
    ):
        assert call(verb, str(tmp_path / name)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line and str(tmp_path / name) in line


@pytest.mark.parametrize("name", ["no", 300 * "n"], ids=len)
@pytest.mark.parametrize("verb", ["runs", "compare", "resume", "export"])
def test_a_missing_run_is_reported_in_one_line(verb, name, tmp_path, capsys):
    assert call(verb, str(tmp_path / name)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_that_counts_tokens_is_read_as_others_are(tmp_path):
    words = ("trainer.max_steps=null", "trainer.max_tokens=250")
    run = runs.SeenRun(make_run(tmp_path, "a", *words))
    assert run.max_steps == 4, "250 tokens in batches of 64"
    assert run.facts()["steps"] == "4/4"


def test_a_name_that_is_no_picture_is_refused(tmp_path, capsys):
    run_dir = str(make_run(tmp_path, "a"))
    for name in ("curves", "curves.foo", "."):
        assert call("compare", run_dir, run_dir, "--out", str(tmp_path / name)) == 2
        assert "no name of a picture" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run_dir = make_run(tmp_path, "a")
    assert call("report", str(run_dir), "--to", str(tmp_path)) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_best_loss_is_no_nan_where_a_validation_has_a_number(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    (tmp_path / "metrics.csv").write_text("step,val/loss\n1,nan\n3,4.5\n5,4.25\n")
    assert SeenRun(tmp_path).best_loss == 4.25


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run_dir = str(make_run(tmp_path, "a"))
    (tmp_path / "notes").touch()
    assert call("compare", run_dir, run_dir, "--out", str(tmp_path / "notes/c.png")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_run_whose_validations_were_all_nan_can_be_compared(folder, capsys):
    run_dir = make_run(folder, "debug/20261101-120006-n")
    rows = "step,train/loss,val/loss,time/tokens_per_s\n0,5.0,,\n1,,nan,\n"
    (run_dir / "metrics.csv").write_text(rows)
    words = (str(run_dir), str(folder / "latest"), "--out", str(folder / "c.png"))
    assert call("compare", *words) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "120006-n" in line]
    assert line.split()[-1] == "nan", "there is no best one"


def test_runs_of_an_experiment_on_another_disk_are_listed_once(folder, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    name = make_run(disk, "20261101-120007-x").name
    (folder / "linked").symlink_to(disk)
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(f"linked/{name}")
    (disk / "back").symlink_to(folder)
    newest, *others = [str(run.path.relative_to(folder)) for run in runs.find_runs(folder)]
    assert newest == f"linked/{name}" and len(others) == 6
