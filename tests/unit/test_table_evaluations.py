"""A table evaluates each run right after its training; what fails says why and is made again."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scmoe.config.load import to_yaml
from scmoe.experiments.studies.job import State, lock_of
from scmoe.experiments.studies.table import evaluations
from scmoe.experiments.studies.table.copies import adopt
from scmoe.experiments.studies.table.evaluations import Evaluations
from scmoe.experiments.studies.table.rows import load_table
from scmoe.experiments.studies.table.table_runs import Run, plan_runs
from scmoe.experiments.studies.table.trainings import make_runs

CONFIGS = Path(__file__).parents[2] / "configs/experiment"
TEXT = "../shared/data/wikitext-2/test.txt"  # as Table 7 has it
TEXTS = {TEXT: {"perplexity": 30.0}}
# A fake evaluate command: it notes its words, and writes a perplexity of TEXT unless a file `broken` is in the run.
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


def write_run(run_dir: Path, run: Run) -> None:
    """Write the files that a finished training leaves."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(run.config))
    environment = {"cpus": 2, "platform": "Linux-6", "git_commit": "abc", "packages": {"torch": "2.13"}}
    (run_dir / "env.json").write_text(json.dumps(environment))
    (run_dir / "metrics.csv").write_text("step,val/loss\n3,3.5\n")
    (run_dir / "summary.json").write_text(json.dumps({"val_loss": 3.5}))


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Table 7 with two finished runs, whose evaluation is a fake."""
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    monkeypatch.setattr(evaluations, "EVALUATE", (sys.executable, "-S", str(tmp_path / "evaluate.py")))
    table = load_table("table7", CONFIGS)
    scale = replace(table.scales["smoke"], evaluate=("--text", "some.txt"))
    runs = plan_runs(table, scale, tmp_path / "study", 1)[:2]
    for i, run in enumerate(runs):
        (tmp_path / f"run{i}/checkpoints/step=4.ckpt").mkdir(parents=True)
        run.job.state = State("finished", str(tmp_path / f"run{i}"), results={"digest": run.digest, "summary": {}})

    def evaluate(scale=scale, here=lambda words: 1, jobs=2):
        made = Evaluations(table, scale)
        with lock_of(tmp_path / "study") as lock:
            assert make_runs(runs, lock, jobs, ["val_loss"], made, here) == 0
        return list(made.of)

    return tmp_path, runs, scale, evaluate


def test_an_evaluation_is_kept_and_not_made_again(evaluated):
    folder, runs, _, evaluate = evaluated
    assert [job.state.status for job in evaluate()] == ["finished"] * 2
    kept = json.loads(runs[0].job.state_file.read_text())["results"]["evaluation"]
    assert kept == {"step": 4, "texts": TEXTS}, "the last checkpoint's"
    assert evaluate() == []
    assert (folder / "run0/words").read_text() == "--text some.txt\n"


def test_a_failed_evaluation_says_why_and_is_made_again(evaluated):
    folder, runs, _, evaluate = evaluated
    (folder / "run1/broken").touch()
    jobs = evaluate()
    assert [job.state.status for job in jobs] == ["finished", "failed"]
    assert jobs[1].state.error == "exit code 1: ValueError: no text"
    (folder / "run1/broken").unlink()
    jobs = evaluate()
    assert [(job.title, job.state.status) for job in jobs] == [
        (f"evaluation of {runs[1].row.name}, seed 1", "finished")
    ]


def test_an_evaluation_without_its_metric_has_failed(evaluated):
    _, _, scale, evaluate = evaluated
    jobs = evaluate(replace(scale, evaluate=()))
    assert {job.state.error for job in jobs} == {
        f"it ended without a finite texts.{TEXT}.perplexity in evaluation.json"
    }


def test_another_command_evaluates_again_and_old_results_are_not_compared_with_new_ones(evaluated):
    folder, runs, scale, evaluate = evaluated
    evaluate()
    (folder / "run1/broken").touch()
    evaluate(replace(scale, evaluate=("--text", "other.txt")))
    assert ["evaluation" in run.state.results for run in runs] == [True, False]
    for name in ("run0/words", "run1/words", "run1/broken"):
        (folder / name).unlink()
    evaluate()
    jobs = evaluate(replace(scale, evaluate=("--text", "some.txt", "--stride", "8")))
    assert [job.state.status for job in jobs] == ["finished"] * 2
    assert (folder / "run0/words").read_text() == "--text some.txt\n--text some.txt --stride 8\n"


def test_in_one_process_the_command_is_called(evaluated):
    _, _, _, evaluate = evaluated
    called = []
    jobs = evaluate(here=lambda *words: called.append(words) or 1, jobs=0)
    assert len(called) == 2 and {job.state.status for job in jobs} == {"failed"}


def test_a_scale_without_evaluation_evaluates_nothing(evaluated):
    _, _, scale, evaluate = evaluated
    assert evaluate(replace(scale, evaluate=None)) == []


def test_each_evaluation_follows_its_training(evaluated):
    """A table that is stopped then keeps whole results of its first runs."""
    _, runs, _, evaluate = evaluated
    trainings = []

    def here(verb: str, first: str, *words: str) -> int:
        trainings.append(verb == "train")
        if verb == "train":
            run = next(run for run in runs if f"name={run.job.name}" in words)
            write_run(run.job.home / "stamp", run)
        else:
            (Path(first) / "evaluation.json").write_text(json.dumps({"a": {"step": 4, "texts": TEXTS}}))
        return 0

    for run in runs:
        run.job.state = State()
    jobs = evaluate(here=here, jobs=0)
    assert trainings == [True, False] * 2
    assert [job.state.status for job in jobs] == ["finished"] * 2
    assert [run.state.results["evaluation"]["texts"] for run in runs] == [TEXTS] * 2


def test_a_state_without_its_evaluation_is_taken_only_where_its_weights_are(evaluated):
    folder, runs, scale, evaluate = evaluated
    evaluate()
    lacking = runs[0]
    del lacking.state.results["evaluated_by"]
    for run in runs:
        run.job.keep()
        run.job.state = State()
    sources, made = [folder], Evaluations(load_table("table7", CONFIGS), scale)
    assert adopt(runs, sources, made) == 2
    for run in runs:
        run.job.state = State()
    shutil.rmtree(folder / "run0")
    assert adopt(runs, sources, made) == 1
    assert [run.state.status for run in runs] == ["waiting", "finished"]
    assert [made.can_use(run.state) for run in runs] == [False, True]
