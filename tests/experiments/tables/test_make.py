"""A table trains, evaluates and measures what is not finished; what fails says why, and is made
again."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from experiments.tables import table_speeds
from experiments.tables.evaluations import Evaluations
from experiments.tables.make import make_runs, paths_of_other_data
from experiments.tables.table_file import Scale, TableOptions, TableRow, load_table
from experiments.tables.table_plan import plan_table
from experiments.tables.table_runs import Run, plan_runs, read_states
from experiments.tables.table_speeds import measure_speeds, read_speeds
from scmoe.config.as_yaml import to_yaml
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.sweeps import batch
from scmoe.sweeps.batch import JobBatch
from scmoe.sweeps.jobs import State, StudyJob, clock, hold_lock

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs/experiment"
DEBUG = Scale(ROOT / "configs/debug.yaml", 2, 0)
TABLE3, TABLE7 = load_table("table3", CONFIGS), load_table("table7", CONFIGS)
TEXTS = {"../shared/data/wikitext-2/test.txt": {"perplexity": 30.0}}  # as Table 7 has it
ROWS = (
    TableRow(
        "top-2", ("a",), {"val_loss": 3.2}, ("moe.architecture=top_k", "moe.top_k=2"), "top-2"
    ),
    TableRow("ScMoE", ("a", "b"), {"val_loss": 3.1}, (), "top-2"),
)
TEXT = ("--text", "some.txt")


class Fakes:
    """Commands of this process that only write the files of real ones. calls: verb and run of each
    call.

    orders: what the next call for a run raises; a training that is asked to stop leaves a
    checkpoint.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stamps = count(1)
        self.orders: dict[str, BaseException] = {}

    def __call__(self, verb: str, first: str, *words: str) -> int:
        if verb == "bench":
            self.bench(words)
            return 0
        run_dir = self.begun(first, words) if verb == "train" else Path(first)
        self.calls.append(f"{verb} {run_dir.parent.name}")
        if order := self.orders.pop(run_dir.parent.name, None):
            if isinstance(order, SystemExit):
                (run_dir / "checkpoints/step=3.ckpt").mkdir(parents=True)
                print("step 3/10  train/loss 1")
            raise order
        if verb == "evaluate":
            entries = {
                "step=1.ckpt": {"step": 1, "texts": {}},
                "step=4.ckpt": {"step": 4, "texts": words and TEXTS},
            }
            (run_dir / "evaluation.json").write_text(json.dumps(entries))
        else:
            environment = {
                "cpus": 2,
                "platform": "Linux-6",
                "git_commit": "abc",
                "packages": {"torch": "2.13"},
            }
            (run_dir / "env.json").write_text(json.dumps(environment))
            (run_dir / "metrics.csv").write_text("step,val/loss\n1,3.5\n4,3.25\n")
            (run_dir / "summary.json").write_text(json.dumps({"val_loss": 3.25}))
        return 0

    def begun(self, config: str, words: tuple[str, ...]) -> Path:
        own = dict(word.split("=", 1) for word in words)
        run_dir = Path(own["runs_dir"], own["name"], f"stamp-{next(self.stamps)}")
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text(to_yaml(load_config(config, words)))
        return run_dir

    def bench(self, words: tuple[str, ...]) -> None:
        share, out = (words[words.index(option) + 1] for option in ("--share", "--out"))
        Path(out).mkdir(parents=True, exist_ok=True)
        every = "-every-1" if "--every" in words else ""
        path = Path(out) / f"overlap-emulated-block-2-ranks-share-{share}{every}.json"
        rows = dict.fromkeys(words[words.index("--rows") + 1 : words.index("--out")])
        path.write_text(json.dumps({"words": words, "rows": rows}))
        self.calls.append(f"bench {share}")


@pytest.fixture
def fakes(monkeypatch):
    made = Fakes()
    monkeypatch.setattr(batch, "call", made)
    return made


def plan(folder: Path, *overrides: str) -> list[Run]:
    return plan_runs(replace(TABLE3, rows=ROWS), DEBUG, folder / "t", 2, overrides)


def made(runs: list[Run], needed: str = "val_loss") -> int:
    with hold_lock(runs[0].job.study) as lock:
        read_states(runs)
        return make_runs(runs, lock, 0, [needed], Evaluations(TABLE3, DEBUG))


def statuses(runs: list[Run]) -> list[str]:
    read_states(runs)
    return [run.state.status for run in runs]


def test_a_failed_run_is_marked_and_tried_again_and_finished_ones_are_skipped(
    fakes, tmp_path, capsys
):
    runs = plan(tmp_path)
    fakes.orders["scmoe-seed1"] = RuntimeError("out of memory")
    assert made(runs) == 0
    assert statuses(runs) == ["finished", "failed", "finished", "finished"]
    failed = runs[1].state
    assert failed.error == "exit code 1: RuntimeError: out of memory"
    assert f"(ScMoE, seed 1) failed: {failed.error}, " in capsys.readouterr().err
    fakes.calls.clear()
    assert made(plan(tmp_path)) == 0
    assert fakes.calls == ["train scmoe-seed1"] and statuses(runs) == ["finished"] * 4


def test_runs_of_another_config_are_made_again(fakes, tmp_path):
    made(plan(tmp_path))
    changed = plan(tmp_path, "optim.lr=0.5")
    assert statuses(changed) == ["waiting"] * 4
    made(changed)
    assert len(fakes.calls) == 8 and statuses(changed) == ["finished"] * 4
    assert statuses(plan(tmp_path)) == ["waiting"] * 4, "each run keeps only its last state"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.faults)]
)
def test_a_stopped_table_goes_on_with_its_checkpoints(number, fakes, tmp_path):
    runs = plan(tmp_path)
    fakes.orders["scmoe-seed1"] = SystemExit(128 + number)
    assert made(runs) == number
    assert statuses(runs) == ["finished", "cut", "waiting", "waiting"] and runs[1].state.done == 0.3
    fakes.calls.clear()
    assert made(runs) == 0
    assert fakes.calls == ["resume scmoe-seed1", "train top-2-seed2", "train scmoe-seed2"]
    assert statuses(runs) == ["finished"] * 4


def test_what_a_killed_batch_and_a_config_with_fewer_keys_have_left_is_read_again(fakes, tmp_path):
    """A run that ended after its batch was killed is finished, and one whose state has the digest
    of a configuration without a key of today's."""
    runs = plan(tmp_path)
    made(runs)
    fakes.calls.clear()
    runs[0].job.state = State("running", seconds=5.0)
    runs[0].job.keep()
    assert runs[0].job.read() == State("cut", seconds=5.0)
    runs[1].state.results = {"val_loss": 3.1, "digest": "of fewer keys"}
    runs[1].job.keep()
    made(runs)
    assert fakes.calls == []
    kept = runs[0].state.results
    assert kept["summary"] == {"val_loss": 3.25}
    assert kept["curve"] == [(2, 3.5), (4, 3.25)], (
        "steps count from 0; the last validation comes after the last step"
    )
    assert runs[1].state.results["digest"] == runs[1].digest


def test_a_cut_run_is_resumed_beside_an_older_one_that_has_ended(fakes, tmp_path):
    """As after an evaluation was lost with its weights: the run is trained again, and cut."""
    run, *_ = plan(tmp_path)
    made([run])
    run.job.state = State()
    run.job.keep()
    fakes.orders["top-2-seed1"] = SystemExit(128 + signal.SIGINT)
    made([run])
    fakes.calls.clear()
    assert statuses([run]) == ["cut"] and made([run]) == 0
    assert fakes.calls == ["resume top-2-seed1"] and statuses([run]) == ["finished"]
    assert run.state.run_dir == str(run.job.run_dirs()[0])


def test_a_run_that_ends_without_its_metric_has_failed(fakes, tmp_path):
    run, *_ = plan(tmp_path)
    made([run], "no_such")
    assert run.state.error == "it ended without a finite no_such in its summary"


def test_a_training_that_does_not_stop_is_killed_at_the_second_request(tmp_path):
    """The processes that it has started are killed too, and the run counts as cut."""
    script = (
        "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN);"
        " subprocess.Popen(['sleep', '60'])\n"
    )
    launcher = (sys.executable, "-c", f"{script}print('ready', flush=True)\ntime.sleep(60)")
    one = StudyJob("deaf", "deaf", tmp_path, tmp_path / "deaf", [str(tmp_path)], launcher)
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        for _ in range(2):
            while not (one.log.exists() and "ready" in one.log.read_text()):
                threading.Event().wait(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.5)

    thread = threading.Thread(target=twice)
    thread.start()
    with hold_lock(tmp_path) as lock:
        assert JobBatch([one], 1, 1, lambda batch, ended: None).run(lock) == signal.SIGINT
    thread.join()
    assert one.state.status == "cut" and signal.getsignal(signal.SIGINT) == before
    with hold_lock(tmp_path):
        pass  # the killed processes have released the lock


def test_a_full_disk_leaves_no_training_behind(tmp_path):
    def full(job: StudyJob) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    jobs = [StudyJob(s, s, tmp_path, None, [s], ("sleep",), judge=full) for s in ("0.1", "60")]
    with hold_lock(tmp_path) as lock, pytest.raises(OSError, match="No space left"):
        JobBatch(jobs, 2, 2, lambda batch, ended: None).run(lock)
    with hold_lock(tmp_path):
        pass  # both processes have released the lock


def test_time_left_is_that_of_runs_in_parallel(tmp_path):
    states = [State("finished"), State("running", done=0.5), State()]
    jobs = [StudyJob("a", "a", tmp_path, tmp_path, [], state=state) for state in states]
    assert JobBatch(jobs, 2, 3, lambda batch, ended: None).seconds_left() is None
    jobs[1].worked_s, jobs[1].progress = 100.0, 0.5
    assert JobBatch(jobs, 2, 3, lambda batch, ended: None).seconds_left() == pytest.approx(
        1.5 * 200 / 2
    )


def test_time_left_does_not_take_a_start_for_steps(tmp_path):
    """A training of 200 steps of 0.1 s, which has started in 30 s, is seen at its steps 2 and 4."""
    job = StudyJob("a", "a", tmp_path, tmp_path, [], state=State("running"))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    batch = JobBatch([job], 1, 1, lambda batch, ended: None)
    for step, seconds in ((2, 30.2), (4, 0.2)):
        job.log.write_text(f"step {step}/200  train/loss 1\n")
        job.advance(seconds)
    assert batch.seconds_left() == pytest.approx(196 * 0.1)
    batch.total = 2
    assert batch.seconds_left() == pytest.approx(196 * 0.1 + 30 + 20)
    assert [clock(s) for s in (5, 65, 3700)] == ["5 s", "1 min 05 s", "1 h 01 min"]


@pytest.fixture
def evaluated(fakes, tmp_path):
    """Return Table 7 with two finished runs, of which `evaluate` returns the jobs of their
    evaluations."""
    smoke = TABLE7.scales["smoke"]
    runs = plan_runs(TABLE7, smoke, tmp_path / "study", 1)[:2]
    for i, run in enumerate(runs):
        run_dir = tmp_path / f"run{i}/stamp"
        (run_dir / "checkpoints/step=4.ckpt").mkdir(parents=True)
        run.job.state = State(
            "finished", str(run_dir), results={"digest": run.digest, "summary": {}}
        )

    def evaluate(*words: str) -> list[StudyJob]:
        evaluations = Evaluations(TABLE7, replace(smoke, evaluate=words))
        with hold_lock(tmp_path / "study") as lock:
            assert make_runs(runs, lock, 0, ["val_loss"], evaluations) == 0
        return evaluations.jobs

    return runs, evaluate


def test_an_evaluation_is_kept_until_another_command_is_asked_for(evaluated, fakes):
    """Results of the earlier command are dropped: they are not compared with those of the later
    one."""
    runs, evaluate = evaluated
    assert not Evaluations(TABLE7, TABLE7.scales["smoke"]).lacking(runs[0].state), (
        "this scale has no evaluation"
    )
    assert [job.state.status for job in evaluate(*TEXT)] == ["finished"] * 2
    kept = json.loads(runs[0].job.state_file.read_text())["results"]["evaluation"]
    assert kept == {"step": 4, "texts": TEXTS}, "the last checkpoint's"
    assert evaluate(*TEXT) == []
    fakes.orders["run1"] = ValueError("no text")
    jobs = evaluate(*TEXT, "--stride", "8")
    assert [job.state.status for job in jobs] == ["finished", "failed"]
    assert jobs[1].state.error == "exit code 1: ValueError: no text"
    assert ["evaluation" in run.state.results for run in runs] == [True, False]
    (again,) = evaluate(*TEXT, "--stride", "8")
    assert (again.name, again.state.status) == (jobs[1].name, "finished")


def test_an_evaluation_of_data_that_is_not_here_is_refused_before_a_training(evaluated, tmp_path):
    runs, _ = evaluated
    text = tmp_path / "text.txt"
    evaluations = Evaluations(
        TABLE7, replace(TABLE7.scales["smoke"], evaluate=("--text", str(text)))
    )
    with pytest.raises(ConfigError, match=r"there is no .*text\.txt"):
        evaluations.check_data(runs)
    text.touch()
    evaluations.check_data(runs)


def test_an_evaluation_without_its_metric_has_failed(evaluated):
    """Without a text the fake one finds nothing."""
    (error,) = {job.state.error for job in evaluated[1]()}
    assert (
        error
        == f"it ended without a finite texts.{next(iter(TEXTS))}.perplexity in evaluation.json"
    )


def test_each_evaluation_follows_its_training(evaluated, fakes):
    """A table that is stopped then keeps whole results of its first runs."""
    runs, evaluate = evaluated
    for run in runs:
        run.job.state = State()
    assert [job.state.status for job in evaluate(*TEXT)] == ["finished"] * 2
    assert [call.split()[0] for call in fakes.calls] == ["train", "evaluate"] * 2
    assert [run.state.results["evaluation"]["texts"] for run in runs] == [TEXTS] * 2


def test_a_state_without_its_evaluation_is_kept_only_where_its_weights_are(evaluated, tmp_path):
    runs, evaluate = evaluated
    evaluate(*TEXT)
    evaluations = Evaluations(TABLE7, replace(TABLE7.scales["smoke"], evaluate=TEXT))
    assert [evaluations.can_use(run.state) for run in runs] == [True, True]
    for run in runs:
        del run.state.results["evaluated_by"]
    shutil.rmtree(tmp_path / "run0")
    assert [evaluations.can_use(run.state) for run in runs] == [False, True]


def test_a_run_with_extensions_is_resumed_and_evaluated_with_them(tmp_path):
    """A kept configuration imports nothing, so commands name modules and callbacks again."""
    words = ["extensions=[docs.examples.my_architecture]", "callbacks.surprise.every=3"]
    run = plan_runs(TABLE7, TABLE7.scales["smoke"], tmp_path, 1, words)[0]
    assert run.job.command(tmp_path / "run")[-3:] == [str(tmp_path / "run"), *words]
    evaluations = Evaluations(TABLE7, replace(TABLE7.scales["small"], evaluate=("--tasks", "none")))
    assert (
        words[0] in evaluations.job(run).arguments
        and words[1] not in evaluations.job(run).arguments
    )


def test_speeds_are_measured_at_every_share_until_the_command_changes(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(
        table_speeds, "JobBatch", lambda jobs, slots, total, watch: JobBatch(jobs, 0, total, watch)
    )

    def measure(*words: str) -> list[str]:
        with hold_lock(tmp_path) as lock:
            jobs, _ = measure_speeds(
                TABLE3, replace(TABLE3.scales["smoke"], bench=words), tmp_path, lock
            )
        assert {job.state.status for job in jobs} == {"finished"}
        return read_speeds(TABLE3, tmp_path)[0.52]["words"]

    first = measure("--rounds", "2")
    rows = first[first.index("--rows") + 1 : first.index("--out")]
    in_one_batch = ["top2", "shared_expert", "scmoe_pos2", "scmoe_pos1", "scmoe_pos3"]
    assert rows == [*in_one_batch, *(f"{row}_two" for row in in_one_batch)]
    measure("--rounds", "2")
    assert fakes.calls == ["bench 0.15", "bench 0.52"]
    assert measure("--rounds", "5")[-1] == "5"
    assert measure("--every", "1")[-1] == "1"
    assert len(list((tmp_path / "speed").iterdir())) == 2, (
        "speeds by an earlier command are removed"
    )
    further = replace(TABLE3, rows=[*TABLE3.rows, replace(TABLE3.rows[0], speed="farskip")])
    assert read_speeds(further, tmp_path) == {}, "reports that lack a row are measured again"


@pytest.mark.parametrize("words", [("--every", "1"), ("--every=1", "--rounds", "9")])
def test_a_row_that_the_testbed_cannot_measure_is_refused_before_the_first_training(words):
    scale = replace(TABLE3.scales["smoke"], bench=words)
    with pytest.raises(ConfigError, match=r"'scmoe_pos3', allowed: top2 .*farskip"):
        plan_table(replace(TABLE3, scales={"smoke": scale}), TableOptions(), ())
    known = [row for row in TABLE3.rows if row.speed != "scmoe_pos3"]
    assert plan_table(replace(TABLE3, rows=known, scales={"smoke": scale}), TableOptions(), ()).runs


def test_runs_that_have_read_other_data_than_the_newest_are_named_with_their_directories(tmp_path):
    """A state alone would be made again of its run directory."""
    runs = plan_runs(TABLE3, TABLE3.scales["smoke"], tmp_path, 1)[:3]
    for run, data in zip(runs, ("new", "old", "new"), strict=True):
        run_dir = run.job.home / "2026-01-01_00-00-00"
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
        run.job.state = State("finished", str(run_dir), results={"data": data})
        run.job.keep()
    assert paths_of_other_data(runs) == [runs[1].job.state_file, *runs[1].job.run_dirs()]
    assert len(runs[1].job.run_dirs()) == 1
