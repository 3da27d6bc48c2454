"""The command of Table 3 at the scale `smoke` trains all rows and writes three files."""

from __future__ import annotations

import json
import math

import pytest

from scmoe.config.load import load
from tests.support.commands import ROOT, run

pytestmark = [pytest.mark.smoke, pytest.mark.dist]


def test_table3_at_smoke(tmp_path):
    last = run("-m", "experiments.table", "table3", "--scale", "smoke", f"runs_dir={tmp_path}").summary
    assert (last["finished"], last["failed"], last["cut"]) == (16, 0, 0)
    folder = tmp_path / "tables/table3-smoke"
    found = json.loads((folder / "results.json").read_text())
    assert len(found["rows"]) == 8
    chance = math.log(load(ROOT / found["config"]).data.vocab_size)
    for row in found["rows"]:
        assert row["paper"]["val_loss"] > 3
        assert row["ours"]["n"] == 2
        assert row["ours"]["mean"] == pytest.approx(chance, abs=0.5), "after four steps the loss is near that of chance"
        assert row["ours"]["std"] > 0
    assert all(row["difference"]["n"] == 2 for row in found["rows"][1:])
    assert (folder / "table.md").exists()
    assert (folder / "chart.png").exists()
