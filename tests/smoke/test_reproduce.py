"""The command of all tables at the scale `smoke` trains every row and writes every table's files."""

from __future__ import annotations

import json
import math
import re

import pytest

from scmoe.config.load import load
from scmoe.experiments.studies.table.table_file import load_table
from tests.support.commands import ROOT, run

SMOKE = ("--scale", "smoke", "analysis.expert_load=false")  # its chart takes a fifth of such a run
pytestmark = [pytest.mark.smoke, pytest.mark.dist]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    kept = ("--seeds", "1", "--to", str(runs / "kept"))
    return runs, run("-m", "experiments.reproduce", *SMOKE, *kept, f"runs_dir={runs}")


def table(folder, number: int) -> dict:
    return json.loads((folder / f"tables/table{number}-smoke/results.json").read_text())


def test_every_row_of_every_table_has_results(reproduced):
    folder, done = reproduced
    last = done.summary
    rows = {str(n): len(load_table(f"table{n}", ROOT / "configs/experiment").rows) for n in range(1, 8)}
    assert (last["tables"], last["failed"], last["cut"]) == (rows, 0, 0)
    for number in range(1, 8):
        files = {path.name for path in (folder / f"tables/table{number}-smoke").iterdir()}
        assert {"table.md", "results.json", "chart.png"} <= files
        assert len(list((folder / f"kept/table{number}-smoke/states").glob("*.json"))) == rows[str(number)]


def test_costs_and_time_left_are_said_before_a_table_begins(reproduced):
    lines = reproduced[1].err.splitlines()
    assert (
        len([line for line in lines if re.match(r"table\d at smoke: \d+ runs of \d+ rows, about 15 s, in ", line)]) == 7
    )
    assert [line for line in lines if re.match(r"3 of 7 tables to do, about .* left", line)]


def test_table3_has_losses_near_chance(reproduced):
    found = table(reproduced[0], 3)
    chance = math.log(load(ROOT / found["config"]).data.vocab_size)
    for row in found["rows"]:
        assert row["paper"]["val_loss"] > 3
        assert row["ours"]["mean"] == pytest.approx(chance, abs=0.5), "after four steps the loss is near that of chance"


def test_a_second_seed_adds_its_runs_to_those_of_the_first(reproduced):
    folder, _ = reproduced
    assert all(row["ours"]["n"] == 1 for row in table(folder, 4)["rows"])
    done = run("-m", "experiments.table", "table4", *SMOKE, "--seeds", "2", f"runs_dir={folder}")
    found = table(folder, 4)
    assert (done.summary["finished"], done.summary["failed"]) == (2 * len(found["rows"]), 0)
    assert done.err.count(" finished: ") == len(found["rows"]), "the first seed's runs are not done again"
    assert all(row["ours"]["n"] == 2 and row["ours"]["std"] > 0 for row in found["rows"])
    assert all(row["minus_baseline"]["n"] == 2 for row in found["rows"][1:])


def test_table1_has_speeds_of_its_own_run(reproduced):
    found = table(reproduced[0], 1)
    assert list(found["equal_time"]) == ["equal_tokens", "0.52"], "0.15 is not measured at this scale"
    for row in found["rows"]:
        own = row["others"]["training speed-up"]["ours"]
        assert own["mean"] > 0 and own["n"] == 2 and own["links"] in ("shaped", "loopback")


def test_tables_share_equal_runs(reproduced):
    assert table(reproduced[0], 5)["taken_from"] == {"table1-smoke": 4}
