"""A batch skips finished runs, marks failed ones and resumes cut ones; a table's rows differ only in their model."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load, to_yaml
from scmoe.experiments.studies.batch import Batch
from scmoe.experiments.studies.job import Job, State, lock_of
from scmoe.experiments.studies.progress import clock
from scmoe.experiments.studies.table.evaluations import Evaluations
from scmoe.experiments.studies.table.rows import Row, Scale, load_table
from scmoe.experiments.studies.table.table_runs import Run, plan_runs, read_states, same_config
from scmoe.experiments.studies.table.trainings import make_runs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/experiment"
DEBUG = Scale(ROOT / "configs/debug.yaml", 2, 2)
NO_EVALUATION = Evaluations(load_table("table3", CONFIGS), DEBUG)

# This fake training only writes the files that a real one leaves. A file `orders/<name>` says how it behaves.
FAKE = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
args = sys.argv[1:]
if args[0] == "resume":
    run_dir, name = pathlib.Path(args[1]), pathlib.Path(args[1]).parent.name
else:
    words = dict(word.split("=", 1) for word in args[2:])
    name = words["name"]
    run_dir = pathlib.Path(words["runs_dir"], name, "stamp-" + str(time.time_ns()))
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text((folder / "configs" / name).read_text())
with open(folder / "calls", "a") as calls:
    print(name, args[0], file=calls)
order = folder / "orders" / name
do = order.read_text() if order.exists() else ""
if do:
    order.unlink()
if do == "fail":
    print("Traceback of many lines")
    sys.exit("RuntimeError: out of memory")
if do == "wait":
    def stop(*_):
        (run_dir / "checkpoints" / "step=3.ckpt").mkdir(parents=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    print("step 3/10  train/loss 1", flush=True)
    time.sleep(60)
environment = {"cpus": 2, "platform": "Linux-6", "git_commit": "abc", "packages": {"torch": "2.13"}}
(run_dir / "env.json").write_text(json.dumps(environment))
(run_dir / "metrics.csv").write_text("step,val/loss\\n1,3.5\\n4,3.25\\n")
(run_dir / "summary.json").write_text(json.dumps({"val_loss": 3.0 + len(name) / 100}))
"""


@pytest.fixture
def table(tmp_path):
    """A table of two rows and two seeds of configs/debug.yaml, whose runs are fake trainings."""

    class Case:
        rows = (
            Row("top-2", ("a",), {"val_loss": 3.2}, ("moe.architecture=top_k", "moe.top_k=2"), "top-2"),
            Row("ScMoE", ("a", "b"), {"val_loss": 3.1}, (), "top-2"),
        )
        calls = tmp_path / "calls"

        def plan(self, *overrides: str) -> list[Run]:
            table = replace(load_table("table3", CONFIGS), rows=self.rows)
            runs = plan_runs(table, DEBUG, tmp_path / "t", 2, overrides)
            (tmp_path / "configs").mkdir(exist_ok=True)
            for run in runs:
                (tmp_path / "configs" / run.job.name).write_text(to_yaml(run.config))
                run.job.launcher = (sys.executable, "-S", str(tmp_path / "fake.py"), "train")
            return runs

        def order(self, name: str, what: str) -> None:
            (tmp_path / "orders").mkdir(exist_ok=True)
            (tmp_path / "orders" / name).write_text(what)

        def make(self, runs: list[Run], needed: str = "val_loss") -> int:
            self.calls.write_text("")
            with lock_of(runs[0].job.study) as lock:
                read_states(runs)
                return make_runs(runs, lock, 2, [needed], NO_EVALUATION, here=lambda *words: 1)

        def called(self) -> list[str]:
            return sorted(self.calls.read_text().splitlines())

    (tmp_path / "fake.py").write_text(FAKE)
    return Case()


def statuses(runs: list[Run]) -> dict[str, str]:
    read_states(runs)
    return {run.job.name: run.state.status for run in runs}


def test_finished_runs_are_skipped_and_a_failed_one_is_marked_and_tried_again(table, capsys):
    runs = table.plan()
    table.order("scmoe-seed1", "fail")
    assert table.make(runs) == 0
    assert statuses(runs) == {
        "top-2-seed1": "finished",
        "scmoe-seed1": "failed",
        "top-2-seed2": "finished",
        "scmoe-seed2": "finished",
    }
    failed = runs[1].state
    assert failed.error == "exit code 1: RuntimeError: out of memory"
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "(ScMoE, seed 1) failed: exit code 1: RuntimeError: out of memory, " in line]
    assert any(line.endswith(" left") for line in lines)
    assert table.make(table.plan()) == 0
    assert "3 of 4 runs are finished already" in capsys.readouterr().err
    assert table.called() == ["scmoe-seed1 train"]
    assert set(statuses(runs).values()) == {"finished"}
    assert runs[1].state.seconds >= failed.seconds > 0


def test_runs_of_another_config_are_made_again(table):
    table.make(table.plan())
    changed = table.plan("optim.lr=0.5")
    assert set(statuses(changed).values()) == {"waiting"}
    table.make(changed)
    assert len(table.called()) == 4
    assert set(statuses(changed).values()) == {"finished"}
    assert set(statuses(table.plan()).values()) == {"waiting"}, "each run keeps only its last state"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_stopping_saves_every_run_and_the_next_call_goes_on(table, number):
    runs = table.plan()
    table.order("top-2-seed1", "wait")
    table.order("scmoe-seed1", "wait")

    def when_both_train() -> None:
        while not all(run.job.log.exists() and "step 3" in run.job.log.read_text() for run in runs[:2]):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=when_both_train)
    before = signal.getsignal(number)
    thread.start()
    assert table.make(runs) == number
    thread.join()
    assert signal.getsignal(number) == before
    assert list(statuses(runs).values()) == ["cut", "cut", "waiting", "waiting"]
    assert runs[0].state.done == 0.3
    assert table.make(runs) == 0
    assert table.called() == ["scmoe-seed1 resume", "scmoe-seed2 train", "top-2-seed1 resume", "top-2-seed2 train"]
    assert set(statuses(runs).values()) == {"finished"}


def test_the_running_runs_of_a_killed_batch_are_cut(table):
    (run, *_) = table.plan()
    run.job.state = State("running", seconds=5.0)
    run.job.keep()
    assert run.job.read() == State("cut", seconds=5.0)


def test_a_run_that_ended_after_its_batch_was_killed_is_finished(table):
    runs = table.plan()
    table.make(runs)
    runs[0].job.state = State("running")
    runs[0].job.keep()
    table.make(runs)
    assert table.called() == []
    kept = runs[0].state.results
    assert kept["summary"] == {"val_loss": 3.0 + len(runs[0].job.name) / 100}
    assert kept["curve"] == [(2, 3.5), (4, 3.25)], "steps count from 0; the last validation comes after the last step"


def test_a_state_without_what_is_kept_today_is_read_again_from_its_run(table):
    runs = table.plan()
    table.make(runs)
    runs[0].state.results = {"val_loss": 3.1}
    runs[0].job.keep()
    table.make(runs)
    assert table.called() == []
    assert runs[0].state.results["digest"] == runs[0].digest


def test_two_batches_cannot_run_one_table(table):
    runs = table.plan()
    with lock_of(runs[0].job.study), pytest.raises(ConfigError, match="another process is running this study"):
        table.make(runs)


def test_a_run_that_ends_without_its_metric_has_failed(table):
    (run, *_) = table.plan()
    table.make([run], "no_such")
    assert run.state.error == "it ended without a finite no_such in its summary"


def test_a_training_that_does_not_stop_is_killed_at_the_second_request(tmp_path):
    """The processes that it has started are killed too, and the run counts as cut."""
    script = "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN); subprocess.Popen(['sleep', '60'])\n"
    launcher = (sys.executable, "-c", f"{script}print('ready', flush=True)\ntime.sleep(60)")
    one = Job("deaf", "deaf", tmp_path, tmp_path / "deaf", [str(tmp_path)], launcher)

    def twice() -> None:
        for _ in range(2):
            while not (one.log.exists() and "ready" in one.log.read_text()):
                threading.Event().wait(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.5)

    thread = threading.Thread(target=twice)
    thread.start()
    with lock_of(tmp_path) as lock:
        assert Batch([one], 1, 1, lambda batch, ended: None).run(lock) == signal.SIGINT
    thread.join()
    assert one.state.status == "cut"
    with lock_of(tmp_path):
        pass  # the killed processes have released the lock


@pytest.mark.parametrize(("code", "signum"), [(143, signal.SIGTERM), (130, signal.SIGINT)])
def test_a_training_in_this_process_fails_or_stops_alone(code, signum, tmp_path):
    ends = iter([0, RuntimeError("no\nmemory"), SystemExit(code)])

    def train(*words: str) -> int:
        assert words[0] == "train"
        print("step 1/4 ")
        if isinstance(end := next(ends), int):
            return end
        raise end

    jobs = [Job(name, name, tmp_path, tmp_path / name, [name]) for name in "abcd"]
    with lock_of(tmp_path) as lock:
        assert Batch(jobs, 0, 4, lambda batch, ended: None, here=train).run(lock) == signum
    assert [one.state.status for one in jobs] == ["finished", "failed", "cut", "waiting"]
    assert jobs[1].state.error == "exit code 1: RuntimeError: no memory"


def test_time_left_is_that_of_runs_in_parallel(tmp_path):
    states = [State("finished"), State("running", done=0.5), State()]
    jobs = [Job("a", "a", tmp_path, tmp_path, [], state=state) for state in states]
    batch = Batch(jobs, 2, 3, lambda batch, ended: None, worked_s=100.0, progress=0.5)
    assert batch.seconds_left() == pytest.approx(1.5 * 200 / 2)
    assert Batch(jobs, 2, 3, lambda batch, ended: None).seconds_left() is None
    assert [clock(s) for s in (5, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]


def test_a_field_that_is_newer_than_the_run_counts_unless_it_is_at_its_default(tmp_path):
    config = load(ROOT / "configs/debug.yaml")
    (tmp_path / "config.yaml").write_text(
        "".join(line for line in to_yaml(config).splitlines(True) if "z_loss_coef" not in line)
    )
    assert same_config(tmp_path, config)
    assert same_config(tmp_path, load(ROOT / "configs/debug.yaml", ["logger.group=another"])), "the same training"
    assert not same_config(tmp_path, load(ROOT / "configs/debug.yaml", ["moe.z_loss_coef=0.1"]))


def test_a_row_may_have_its_own_learning_rate_and_options(table, monkeypatch):
    monkeypatch.setattr("scmoe.config.rules.extension_rules", lambda config: ())  # options without an extension
    table.rows = (*table.rows, Row("fast", ("a",), {}, ("optim.lr=0.02", "options.routers=4"), "top-2"))
    configs = [run.config for run in table.plan()[:3]]
    assert [config.optim.lr for config in configs] == [1e-3, 1e-3, 0.02]
    assert [config.options for config in configs] == [{}, {}, {"routers": 4}]


def test_a_row_that_changes_the_training_is_refused(table):
    table.rows = (*table.rows, Row("longer", ("a",), {}, ("data.seq_len=32",), "top-2"))
    with pytest.raises(ConfigError, match=r"row 'longer' sets data.seq_len"):
        table.plan()
