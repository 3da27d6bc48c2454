"""A table trains, evaluates and measures what is not finished; what fails says why, and is made again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.config.load import to_yaml
from scmoe.experiments.studies import batch
from scmoe.experiments.studies.batch import Batch
from scmoe.experiments.studies.jobs import Job, State, clock, lock_of
from scmoe.experiments.studies.table import make
from scmoe.experiments.studies.table.make import Evaluations, make_runs, measure_speeds
from scmoe.experiments.studies.table.results import read_speeds
from scmoe.experiments.studies.table.table_file import Row, Scale, load_table
from scmoe.experiments.studies.table.table_runs import Run, adopt, plan_runs, read_states

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/experiment"
DEBUG = Scale(ROOT / "configs/debug.yaml", 2, 2)
TABLE3, TABLE7 = load_table("table3", CONFIGS), load_table("table7", CONFIGS)
TEXT = "../shared/data/wikitext-2/test.txt"  # as Table 7 has it
TEXTS = {TEXT: {"perplexity": 30.0}}
LEAVE = """
import json
def leave(run_dir, val_loss):
    environment = {"cpus": 2, "platform": "Linux-6", "git_commit": "abc", "packages": {"torch": "2.13"}}
    (run_dir / "env.json").write_text(json.dumps(environment))
    (run_dir / "metrics.csv").write_text("step,val/loss\\n1,3.5\\n4,3.25\\n")
    (run_dir / "summary.json").write_text(json.dumps({"val_loss": val_loss}))
"""
# This fake training only writes the files that a real one leaves. A file `orders/<name>` says how it behaves.
TRAIN = f"""{LEAVE}
import pathlib, signal, sys, time
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
leave(run_dir, 3.0 + len(name) / 100)
"""
# This fake evaluation notes its words, and writes a perplexity of TEXT unless a file `broken` is in the run.
EVALUATE = """
import json, pathlib, sys
run_dir = pathlib.Path(sys.argv[1])
print(*sys.argv[2:], file=open(run_dir / "words", "a"))
if (run_dir / "broken").exists():
    sys.exit("ValueError: no text")
texts = {"../shared/data/wikitext-2/test.txt": {"perplexity": 30.0}} if len(sys.argv) > 2 else {}
early = {"step": 1, "texts": {}}
(run_dir / "evaluation.json").write_text(json.dumps({"step=1.ckpt": early, "step=4.ckpt": {"step": 4, "texts": texts}}))
"""
# This fake `bench overlap` writes its words as the report of the share.
BENCH = """
import json, pathlib, sys
words = sys.argv[1:]
share, out = words[words.index("--share") + 1], pathlib.Path(words[words.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / f"overlap-emulated-block-2-ranks-share-{share}.json").write_text(json.dumps({"words": words}))
"""


class Fakes:
    """A table of two rows and two seeds of configs/debug.yaml, whose runs are fake trainings."""

    rows = (
        Row("top-2", ("a",), {"val_loss": 3.2}, ("moe.architecture=top_k", "moe.top_k=2"), "top-2"),
        Row("ScMoE", ("a", "b"), {"val_loss": 3.1}, (), "top-2"),
    )

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name in ("configs", "orders"):
            (folder / name).mkdir()
        (folder / "fake.py").write_text(TRAIN)

    def plan(self, *overrides: str) -> list[Run]:
        runs = plan_runs(replace(TABLE3, rows=self.rows), DEBUG, self.folder / "t", 2, overrides)
        for run in runs:
            (self.folder / "configs" / run.job.name).write_text(to_yaml(run.config))
            run.job.launcher = (sys.executable, "-S", str(self.folder / "fake.py"), "train")
        return runs

    def order(self, name: str, what: str) -> None:
        (self.folder / "orders" / name).write_text(what)

    def make(self, runs: list[Run], needed: str = "val_loss") -> int:
        self.calls.write_text("")
        with lock_of(runs[0].job.study) as lock:
            read_states(runs)
            return make_runs(runs, lock, 2, [needed], Evaluations(TABLE3, DEBUG))

    def called(self) -> list[str]:
        return sorted(self.calls.read_text().splitlines())


@pytest.fixture
def table(tmp_path):
    return Fakes(tmp_path)


def statuses(runs: list[Run]) -> list[str]:
    read_states(runs)
    return [run.state.status for run in runs]


def test_a_failed_run_is_marked_and_tried_again_and_finished_ones_are_skipped(table, capsys):
    runs = table.plan()
    table.order("scmoe-seed1", "fail")
    assert table.make(runs) == 0
    assert statuses(runs) == ["finished", "failed", "finished", "finished"]
    failed = runs[1].state
    assert failed.error == "exit code 1: RuntimeError: out of memory"
    assert f"(ScMoE, seed 1) failed: {failed.error}, " in capsys.readouterr().err
    assert table.make(table.plan()) == 0
    assert table.called() == ["scmoe-seed1 train"]
    assert statuses(runs) == ["finished"] * 4
    assert runs[1].state.seconds >= failed.seconds > 0


def test_runs_of_another_config_are_made_again(table):
    table.make(table.plan()[:1])
    changed = table.plan("optim.lr=0.5")[:1]
    assert statuses(changed) == ["waiting"]
    table.make(changed)
    assert table.called() == ["top-2-seed1 train"] and statuses(changed) == ["finished"]
    assert statuses(table.plan())[:1] == ["waiting"], "each run keeps only its last state"


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
    assert statuses(runs) == ["cut", "cut", "waiting", "waiting"]
    assert runs[0].state.done == 0.3
    assert table.make(runs) == 0
    assert table.called() == ["scmoe-seed1 resume", "scmoe-seed2 train", "top-2-seed1 resume", "top-2-seed2 train"]
    assert statuses(runs) == ["finished"] * 4


def test_what_a_killed_batch_and_an_earlier_version_have_left_is_read_again(table):
    """A run that ended after its batch was killed is finished, and one whose state lacks what is kept today."""
    runs = table.plan()[:2]
    table.make(runs)
    runs[0].job.state = State("running", seconds=5.0)
    runs[0].job.keep()
    assert runs[0].job.read() == State("cut", seconds=5.0)
    runs[1].state.results = {"val_loss": 3.1}
    runs[1].job.keep()
    table.make(runs)
    assert table.called() == []
    kept = runs[0].state.results
    assert kept["summary"] == {"val_loss": 3.0 + len(runs[0].job.name) / 100}
    assert kept["curve"] == [(2, 3.5), (4, 3.25)], "steps count from 0; the last validation comes after the last step"
    assert runs[1].state.results["digest"] == runs[1].digest


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
def test_a_training_in_this_process_fails_or_stops_alone(code, signum, tmp_path, monkeypatch):
    ends = iter([0, RuntimeError("no\nmemory"), SystemExit(code)])

    def train(*words: str) -> int:
        assert words[0] == "train"
        print("step 1/4 ")
        if isinstance(end := next(ends), int):
            return end
        raise end

    monkeypatch.setattr(batch, "call", train)
    jobs = [Job(name, name, tmp_path, tmp_path / name, [name]) for name in "abcd"]
    with lock_of(tmp_path) as lock:
        assert Batch(jobs, 0, 4, lambda batch, ended: None).run(lock) == signum
    assert [one.state.status for one in jobs] == ["finished", "failed", "cut", "waiting"]
    assert jobs[1].state.error == "exit code 1: RuntimeError: no memory"


def test_time_left_is_that_of_runs_in_parallel(tmp_path):
    states = [State("finished"), State("running", done=0.5), State()]
    jobs = [Job("a", "a", tmp_path, tmp_path, [], state=state) for state in states]
    assert Batch(jobs, 2, 3, lambda batch, ended: None).seconds_left() is None
    jobs[1].worked_s, jobs[1].progress = 100.0, 0.5
    assert Batch(jobs, 2, 3, lambda batch, ended: None).seconds_left() == pytest.approx(1.5 * 200 / 2)
    assert [clock(s) for s in (5, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Table 7 with two finished runs, whose evaluation is a fake."""
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    monkeypatch.setattr(make, "EVALUATE", (sys.executable, "-S", str(tmp_path / "evaluate.py")))
    scale = replace(TABLE7.scales["smoke"], evaluate=("--text", "some.txt"))
    runs = plan_runs(TABLE7, scale, tmp_path / "study", 1)[:2]
    for i, run in enumerate(runs):
        (tmp_path / f"run{i}/checkpoints/step=4.ckpt").mkdir(parents=True)
        run.job.state = State("finished", str(tmp_path / f"run{i}"), results={"digest": run.digest, "summary": {}})

    def evaluate(scale=scale, jobs=2):
        made = Evaluations(TABLE7, scale)
        with lock_of(tmp_path / "study") as lock:
            assert make_runs(runs, lock, jobs, ["val_loss"], made) == 0
        return made.jobs

    return tmp_path, runs, scale, evaluate


def test_an_evaluation_is_kept_until_another_command_is_asked_for(evaluated):
    """Results of the earlier command are dropped: they are not compared with those of the later one."""
    folder, runs, scale, evaluate = evaluated
    assert evaluate(replace(scale, evaluate=None)) == []
    assert [job.state.status for job in evaluate()] == ["finished"] * 2
    kept = json.loads(runs[0].job.state_file.read_text())["results"]["evaluation"]
    assert kept == {"step": 4, "texts": TEXTS}, "the last checkpoint's"
    assert evaluate() == []
    (folder / "run1/broken").touch()
    assert len(evaluate(replace(scale, evaluate=("--text", "some.txt", "--stride", "8")))) == 2
    assert ["evaluation" in run.state.results for run in runs] == [True, False]
    assert (folder / "run0/words").read_text() == "--text some.txt\n--text some.txt --stride 8\n"


def test_a_failed_evaluation_says_why_and_is_made_again(evaluated):
    folder, _, scale, evaluate = evaluated
    jobs = evaluate(replace(scale, evaluate=()))
    assert {job.state.error for job in jobs} == {
        f"it ended without a finite texts.{TEXT}.perplexity in evaluation.json"
    }
    (folder / "run1/broken").touch()
    jobs = evaluate()
    assert [job.state.status for job in jobs] == ["finished", "failed"]
    assert jobs[1].state.error == "exit code 1: ValueError: no text"
    (folder / "run1/broken").unlink()
    (again,) = evaluate()
    assert (again.name, again.state.status) == (jobs[1].name, "finished")


def test_each_evaluation_follows_its_training(evaluated, monkeypatch):
    """A table that is stopped then keeps whole results of its first runs. All are in this process."""
    _, runs, _, evaluate = evaluated
    files: dict = {}
    exec(LEAVE, files)
    trainings = []

    def here(verb: str, first: str, *words: str) -> int:
        trainings.append(verb == "train")
        if verb == "train":
            run = next(run for run in runs if f"name={run.job.name}" in words)
            run_dir = run.job.home / "stamp"
            run_dir.mkdir(parents=True)
            (run_dir / "config.yaml").write_text(to_yaml(run.config))
            files["leave"](run_dir, 3.5)
        else:
            (Path(first) / "evaluation.json").write_text(json.dumps({"a": {"step": 4, "texts": TEXTS}}))
        return 0

    monkeypatch.setattr(batch, "call", here)
    for run in runs:
        run.job.state = State()
    jobs = evaluate(jobs=0)
    assert trainings == [True, False] * 2
    assert [job.state.status for job in jobs] == ["finished"] * 2
    assert [run.state.results["evaluation"]["texts"] for run in runs] == [TEXTS] * 2


def test_a_state_without_its_evaluation_is_taken_only_where_its_weights_are(evaluated):
    folder, runs, scale, evaluate = evaluated
    evaluate()
    del runs[0].state.results["evaluated_by"]
    for run in runs:
        run.job.keep()
        run.job.state = State()
    made = Evaluations(TABLE7, scale)
    assert adopt(runs, [folder], made.can_use) == 2
    for run in runs:
        run.job.state = State()
    shutil.rmtree(folder / "run0")
    assert adopt(runs, [folder], made.can_use) == 1
    assert [run.state.status for run in runs] == ["waiting", "finished"]


def test_a_run_with_extensions_is_resumed_and_evaluated_with_them(tmp_path):
    """What is kept in a run imports nothing, so the commands name the modules and callbacks again."""
    words = ["extensions=[docs.examples.my_architecture]", "callbacks.surprise.every=3"]
    run = plan_runs(TABLE7, TABLE7.scales["smoke"], tmp_path, 1, words)[0]
    assert run.job.command(tmp_path / "run")[-3:] == [str(tmp_path / "run"), *words]
    evaluations = Evaluations(TABLE7, replace(TABLE7.scales["small"], evaluate=("--tasks", "none")))
    assert words[0] in evaluations.job(run).arguments and words[1] not in evaluations.job(run).arguments


def test_speeds_are_measured_at_every_share_until_the_command_changes(tmp_path, monkeypatch):
    (tmp_path / "bench.py").write_text(BENCH)
    monkeypatch.setattr(make, "BENCH", (sys.executable, "-S", str(tmp_path / "bench.py")))
    folder = tmp_path / "study"

    def measure(*words: str) -> list[str]:
        scale = replace(TABLE3.scales["smoke"], bench=words)
        with lock_of(folder) as lock:
            jobs, _ = measure_speeds(TABLE3, scale, folder, lock)
        assert {job.state.status for job in jobs} == {"finished"}
        return read_speeds(folder)[0.52]["words"]

    first = measure("--rounds", "2")
    assert sorted(read_speeds(folder)) == [0.15, 0.52]
    rows = first[first.index("--rows") + 1 : first.index("--out")]
    assert rows == ["top2", "shared_expert", "scmoe_pos2", "scmoe_pos1", "scmoe_pos3"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "speed").iterdir()}
    measure("--rounds", "2")
    assert {path: path.stat().st_mtime_ns for path in (folder / "speed").iterdir()} == before
    assert measure("--rounds", "5")[-1] == "5"
