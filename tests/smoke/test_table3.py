"""Table 3 at smoke, from outside: all rows train, and the three files come out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from scmoe.config.load import load

pytestmark = [pytest.mark.smoke, pytest.mark.dist]

ROOT = Path(__file__).parents[2]
TABLE = [sys.executable, "-m", "experiments.table", "table3", "--scale", "smoke"]


def test_table3_at_smoke(tmp_path):
    done = subprocess.run([*TABLE, f"runs_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["finished"], last["failed"], last["cut"]) == (16, 0, 0)
    folder = tmp_path / "tables/table3-smoke"
    found = json.loads((folder / "results.json").read_text())
    assert len(found["rows"]) == 8
    chance = math.log(load(ROOT / found["config"]).data.vocab_size)
    for row in found["rows"]:
        assert row["paper"]["val_loss"] > 3
        assert row["ours"]["n"] == 2
        assert row["ours"]["mean"] == pytest.approx(chance, abs=0.5), "four steps leave it near that of chance"
        assert row["ours"]["std"] > 0
    assert all(row["difference"]["n"] == 2 for row in found["rows"][1:])
    assert (folder / "table.md").exists()
    assert (folder / "chart.png").exists()
