"""A table measures speeds at every share that it needs, and again when the command changes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from scmoe.experiments.studies.job import lock_of
from scmoe.experiments.studies.table import speeds
from scmoe.experiments.studies.table.rows import load_table

CONFIGS = Path(__file__).parents[2] / "configs/experiment"
# A fake `bench overlap`: it writes its words as the report of the share.
BENCH = """
import json, pathlib, sys
words = sys.argv[1:]
share, out = words[words.index("--share") + 1], pathlib.Path(words[words.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / f"overlap-emulated-block-2-ranks-share-{share}.json").write_text(json.dumps({"words": words}))
"""


def test_speeds_are_measured_at_every_share_until_the_command_changes(tmp_path, monkeypatch):
    (tmp_path / "bench.py").write_text(BENCH)
    monkeypatch.setattr(speeds, "BENCH", (sys.executable, "-S", str(tmp_path / "bench.py")))
    table, folder = load_table("table3", CONFIGS), tmp_path / "study"

    def measure(*words: str) -> list[str]:
        scale = replace(table.scales["smoke"], bench=words)
        with lock_of(folder) as lock:
            jobs, _ = speeds.measure_speeds(table, scale, folder, lock)
        assert {job.state.status for job in jobs} == {"finished"}
        return speeds.read_speeds(folder)[0.52]["words"]

    first = measure("--rounds", "2")
    assert sorted(speeds.read_speeds(folder)) == [0.15, 0.52]
    rows = first[first.index("--rows") + 1 : first.index("--out")]
    assert rows == ["top2", "shared_expert", "scmoe_pos2", "scmoe_pos1", "scmoe_pos3"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "speed").iterdir()}
    measure("--rounds", "2")
    assert {path: path.stat().st_mtime_ns for path in (folder / "speed").iterdir()} == before
    assert measure("--rounds", "5")[-1] == "5"
