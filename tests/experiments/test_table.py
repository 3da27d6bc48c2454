"""The command of all tables, at scale `smoke`, trains every row and writes all files."""

import json
import math
import re
from pathlib import Path

import pytest

from experiments.tables.table_file import load_table
from scmoe.config.load import load_config
from tests.support.commands import ROOT, run

# its chart takes a fifth of such a run
SMOKE = ("--scale", "smoke", "--seeds", "1", "analysis.expert_load=false")
pytestmark = [pytest.mark.smoke, pytest.mark.ranks, pytest.mark.faults]


def results(folder: Path, number: int) -> dict:
    return json.loads((folder / f"tables/table{number}-smoke/results.json").read_text())


def test_all_tables_are_made_in_turn_and_a_second_seed_adds_its_runs(tmp_path):
    kept = tmp_path / "kept"
    words = (*SMOKE, "--to", str(kept), f"runs_dir={tmp_path}")
    done = run("-m", "experiments.table", "all", *words)
    rows = {
        str(n): len(load_table(f"table{n}", ROOT / "configs/experiment").rows) for n in range(1, 8)
    }
    assert (done.summary["tables"], done.summary["failed"], done.summary["cut"]) == (rows, 0, 0)
    for number, count in rows.items():
        files = {path.name for path in (tmp_path / f"tables/table{number}-smoke").iterdir()}
        assert {"table.md", "results.json", "chart.png"} <= files
        states = kept / f"table{number}-smoke/states"
        assert len(list(states.glob("*.json"))) == count
    costs = re.findall(r"^table\d at smoke: \d+ runs of \d+ rows, about ", done.err, re.MULTILINE)
    left = re.findall(r"^\d of 7 tables to do, about .* left", done.err, re.MULTILINE)
    assert (len(costs), len(left)) == (7, 7)

    first = results(tmp_path, 1)
    assert list(first["equal_time"]) == ["equal_tokens", "0.52"], (
        "0.15 is not measured at this scale"
    )
    for row in first["rows"]:
        own = row["others"]["training speed-up"]["ours"]
        assert own["mean"] > 0 and own["n"] == 2 and own["links"] in ("shaped", "loopback")

    third = results(tmp_path, 3)
    chance = math.log(load_config(ROOT / third["config"]).data.vocab_size)
    for row in third["rows"]:
        assert row["ours"]["mean"] == pytest.approx(chance, abs=0.5), (
            "after four steps the loss is near that of chance"
        )

    done = run("-m", "experiments.table", "table4", *SMOKE, "--seeds", "2", f"runs_dir={tmp_path}")
    fourth = results(tmp_path, 4)["rows"]
    assert (done.summary["finished"], done.summary["failed"]) == (2 * len(fourth), 0)
    assert done.err.count(" finished: ") == len(fourth), "the first seed's runs are not done again"
    assert all(row["ours"]["n"] == 2 and row["ours"]["std"] > 0 for row in fourth)
    assert all(row["minus_baseline"]["n"] == 2 for row in fourth[1:])
