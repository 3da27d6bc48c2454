"""After its trainings a table evaluates its runs and measures speeds; failures are reported and made again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scmoe.studies.job import State, lock_of
from scmoe.studies.table import afterwards
from scmoe.studies.table.rows import load_table
from scmoe.studies.table.runs import plan_runs

CONFIGS = Path(__file__).parents[2] / "configs/experiment"
# A fake evaluate command: it notes its words, and writes a perplexity of test.txt unless a file `broken` is in the run.
EVALUATE = """
import json, pathlib, sys
run_dir = pathlib.Path(sys.argv[1])
print(*sys.argv[2:], file=open(run_dir / "words", "a"))
if (run_dir / "broken").exists():
    sys.exit("ValueError: no text")
texts = {"test.txt": {"perplexity": 30.0}} if len(sys.argv) > 2 else {}
early = {"step": 1, "texts": {"test.txt": {"perplexity": 99.0}}}
(run_dir / "evaluation.json").write_text(json.dumps({"step=1.ckpt": early, "step=4.ckpt": {"step": 4, "texts": texts}}))
"""
BENCH = """
import json, pathlib, sys
words = sys.argv[1:]
share, out = words[words.index("--share") + 1], pathlib.Path(words[words.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / f"overlap-emulated-block-2-ranks-share-{share}.json").write_text(json.dumps({"words": words}))
"""


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Table 7 with two finished runs, whose evaluation is a fake."""
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    monkeypatch.setattr(afterwards, "EVALUATE", (sys.executable, "-S", str(tmp_path / "evaluate.py")))
    table = load_table("table7", CONFIGS)
    scale = replace(table.scales["smoke"], evaluate=("--text", "some.txt"))
    runs = plan_runs(table, scale, tmp_path / "study", 1)[:2]
    for i, run in enumerate(runs):
        (tmp_path / f"run{i}").mkdir()
        run.job.state = State("finished", str(tmp_path / f"run{i}"), results={"digest": run.digest, "summary": {}})

    def evaluate(scale=scale, here=lambda words: 1, jobs=2):
        with lock_of(tmp_path / "study") as lock:
            return afterwards.evaluate_all(runs, table, scale, lock, jobs, here)

    return tmp_path, runs, scale, evaluate


def test_an_evaluation_is_kept_and_not_made_again(evaluated):
    folder, runs, _, evaluate = evaluated
    jobs, signal = evaluate()
    assert ([job.state.status for job in jobs], signal) == (["finished"] * 2, 0)
    kept = json.loads(runs[0].job.state_file.read_text())["results"]["evaluation"]
    assert kept == {"step": 4, "texts": {"test.txt": {"perplexity": 30.0}}}, "the last checkpoint's"
    assert evaluate() == ([], 0)
    assert (folder / "run0/words").read_text() == "--text some.txt\n"


def test_a_failed_evaluation_says_why_and_is_made_again(evaluated):
    folder, runs, _, evaluate = evaluated
    (folder / "run1/broken").touch()
    jobs, _ = evaluate()
    assert [job.state.status for job in jobs] == ["finished", "failed"]
    assert jobs[1].state.error == "exit code 1: ValueError: no text"
    (folder / "run1/broken").unlink()
    jobs, _ = evaluate()
    assert [(job.title, job.state.status) for job in jobs] == [
        (f"evaluation of {runs[1].row.name}, seed 1", "finished")
    ]


def test_an_evaluation_without_its_metric_has_failed(evaluated):
    _, _, scale, evaluate = evaluated
    jobs, _ = evaluate(replace(scale, evaluate=()))
    assert {job.state.error for job in jobs} == {"it ended without texts.test.txt.perplexity in evaluation.json"}


def test_another_command_evaluates_again(evaluated):
    folder, _, scale, evaluate = evaluated
    evaluate()
    jobs, _ = evaluate(replace(scale, evaluate=("--text", "some.txt", "--stride", "8")))
    assert [job.state.status for job in jobs] == ["finished"] * 2
    assert (folder / "run0/words").read_text() == "--text some.txt\n--text some.txt --stride 8\n"


def test_in_one_process_the_command_is_called(evaluated):
    _, _, _, evaluate = evaluated
    called = []
    jobs, _ = evaluate(here=lambda *words: called.append(words) or 1, jobs=0)
    assert len(called) == 2 and {job.state.status for job in jobs} == {"failed"}


def test_a_scale_without_evaluation_evaluates_nothing(evaluated):
    _, _, scale, evaluate = evaluated
    assert evaluate(replace(scale, evaluate=None)) == ([], 0)


def test_speeds_are_measured_at_every_share_until_the_command_changes(tmp_path, monkeypatch):
    (tmp_path / "bench.py").write_text(BENCH)
    monkeypatch.setattr(afterwards, "BENCH", (sys.executable, "-S", str(tmp_path / "bench.py")))
    table, folder = load_table("table3", CONFIGS), tmp_path / "study"

    def measure(*words: str) -> list[str]:
        scale = replace(table.scales["smoke"], bench=words)
        with lock_of(folder) as lock:
            jobs, _ = afterwards.measure_speeds(table, scale, folder, lock)
        assert {job.state.status for job in jobs} == {"finished"}
        return afterwards.read_speeds(folder)[0.52]["words"]

    first = measure("--rounds", "2")
    assert sorted(afterwards.read_speeds(folder)) == [0.15, 0.52]
    rows = first[first.index("--rows") + 1 : first.index("--out")]
    assert rows == ["top2", "shared_expert", "scmoe_pos2", "scmoe_pos1", "scmoe_pos3"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "speed").iterdir()}
    measure("--rounds", "2")
    assert {path: path.stat().st_mtime_ns for path in (folder / "speed").iterdir()} == before
    assert measure("--rounds", "5")[-1] == "5"
