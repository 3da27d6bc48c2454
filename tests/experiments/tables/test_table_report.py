"""A table's results have differences, decisions, speeds and losses at equal time; its page and
charts show them."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
from matplotlib.figure import Figure

from experiments.bench.pairs import usual_rows
from experiments.tables.make import make_table
from experiments.tables.results import results
from experiments.tables.table_chart import draw_differences, draw_equal_time
from experiments.tables.table_file import PaperTable, TableOptions, load_table
from experiments.tables.table_page import markdown, without_speed
from experiments.tables.table_plan import plan_table
from experiments.tables.table_report import write_report
from experiments.tables.table_runs import Run, plan_runs
from scmoe.sweeps.jobs import State

CONFIGS = Path(__file__).parents[3] / "configs/experiment"
POS1, POS2, POS3 = (f"ScMoE Pos-{i}, CG-1" for i in (1, 2, 3))
SPEEDS = {
    "top2": 1.0,
    "top1": 1.5,
    "shared_expert": 1.2,
    "scmoe_pos1": 1.4,
    "scmoe_pos2": 1.5,
    "scmoe_pos3": 1.6,
}


def state_of(loss: float, digest: str, **more: object) -> State:
    """Return the state of a finished run whose loss falls on a straight line over four steps, and
    end at `loss`."""
    environment = {
        "machine": "2 CPU cores, Linux",
        "torch": "2.13",
        "git_commit": "abc",
        "date": "20261126",
    }
    kept = {
        "digest": digest,
        "summary": (
            {"val_loss": loss, "perplexity": 10 * loss, "params_total": 2e6, "params_active": 1e6}
            | more
        ),
        "curve": [[step, loss + 0.1 * (4 - step)] for step in (1, 2, 3, 4)],
        "environment": environment,
    }
    return State("finished", None, 10.0, results=kept)


def write_speeds(folder: Path, share: float) -> None:
    """Write a report of `bench overlap` with the speeds of SPEEDS."""
    row = {
        "links": "shaped",
        "compute": "emulated",
        "train_quartiles": [1.1, 1.9],
        "forward_quartiles": [1.1, 2.0],
    }
    rows = {
        name: {**row, "train_speedup": SPEEDS.get(name, 1.0), "forward_speedup": 1.75}
        for row_name in usual_rows(2)
        for name in (row_name, f"{row_name}_two")
    }
    head = {
        "comm_share": share + 0.01,
        "link_mbit": 200.0,
        "ranks": 2,
        "compute": "emulated",
        "level": "block",
    }
    facts = {"rounds": 9, "limit_forward": 2.1, "limit_train": 1.8, "rows": rows}
    path = folder / f"speed/overlap-emulated-block-2-ranks-share-{share:g}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | facts))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    table = load_table("table3", CONFIGS)
    return table, plan_runs(
        table, table.scales["smoke"], tmp_path_factory.mktemp("runs") / "table3-smoke", 3
    )


@pytest.fixture
def made(planned):
    """Return Table 3 with 3 seeds; the loss of row i is 5 + i / 100 + a part of the seed. One run
    failed, one is cut."""
    table, runs = planned
    for i, run in enumerate(runs):
        row, seed = i % len(table.rows), run.seed
        run.job.state = state_of(5 + row / 100 + seed / 10 + (row * seed % 3) / 1000, run.digest)
    by_name = {run.job.name: run for run in runs}
    by_name["scmoe-pos-2-cg-1-seed2"].job.state = State("failed", error="exit code 1: no memory")
    by_name["scmoe-pos-3-cg-1-seed3"].job.state = State("cut", seconds=3.0)
    runs[0].job.study.mkdir(exist_ok=True)
    shutil.rmtree(runs[0].job.study / "speed", ignore_errors=True)
    return table, runs


@pytest.fixture
def figures(monkeypatch):
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


def of(table: PaperTable, runs: list[Run]) -> tuple[dict, dict]:
    """Return the results, and their rows by name."""
    found = results(table, "smoke", runs, "make table TABLE=table3 SCALE=smoke")
    return found, {row["name"]: row for row in found["rows"]}


def planned_of(name: str, folder: Path, seeds: int) -> tuple[PaperTable, list[Run]]:
    table = load_table(name, CONFIGS)
    runs = plan_runs(table, table.scales["smoke"], folder / f"{name}-smoke", seeds)
    runs[0].job.study.mkdir()
    return table, runs


def test_results(made):
    table, runs = made
    found, rows = of(table, runs)
    assert list(rows) == [row.name for row in table.rows]
    top2, shared, cg1 = (rows[name] for name in ("top-2", "shared-expert, CG-2", POS2))
    assert top2["minus_baseline"] is None
    assert top2["paper"] == {"val_loss": 3.270405, "difference": 0.0}
    assert shared["paper"]["difference"] == pytest.approx(3.240592 - 3.270405)
    assert shared["ours"]["n"] == shared["minus_baseline"]["n"] == 3
    assert shared["minus_baseline"]["mean"] == pytest.approx(0.01 + 0.001, abs=1e-9)
    assert (cg1["ours"]["n"], cg1["minus_baseline"]["n"], cg1["failed"]) == (
        2,
        2,
        {2: "exit code 1: no memory"},
    )
    assert rows[POS3]["unfinished"] == [3]
    assert found["tokens_per_run"] == 4 * 8 * 16
    assert found["runs"] == {"finished": 22, "failed": 1}


def test_files(made):
    table, runs = made
    page, kept, chart = write_report(table, "smoke", runs, "")
    text = page.read_text()
    parts = text.partition("## Quality at equal time")
    assert parts[0].count(f"| {POS2} |") == 2, "the row is in both of its groups"
    assert parts[0].count("| top-2 |") == 1
    assert f"Incomplete: {POS2}: 1 failed, 0 to run; {POS3}: 0 failed, 1 to run." in text
    assert json.loads(kept.read_text())["rows"][0]["ours"]["n"] == 3
    write_speeds(runs[0].job.study, 0.52)
    *_, at_equal_time = write_report(table, "smoke", runs, "")
    assert [path.name for path in (chart, at_equal_time)] == ["chart.png", "equal_time.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (chart, at_equal_time))


def test_an_interval_that_goes_on_beyond_the_scale_has_an_arrow(made, figures, tmp_path):
    table, runs = made
    for run in runs:
        loss = 5.1 if run.seed == 1 and not run.row.is_baseline else 5.0
        run.job.state = state_of(loss, run.digest) if run.seed < 3 else State()
    found, _ = of(table, runs)
    draw_differences(found, tmp_path / "chart.png")
    compared = [row["minus_baseline"] for row in found["rows"] if row["minus_baseline"]]
    assert all(minus["low"] < -1 and minus["high"] > 1 for minus in compared), (
        "of two seeds with 0 and 0.1"
    )
    ours = figures[0].axes[1]
    arrows = [line.get_marker() for line in ours.lines if line.get_marker() in "<>"]
    assert arrows == ["<", ">"] * len(compared)
    figures[0].canvas.draw()
    assert "0" in [label.get_text() for label in ours.get_xticklabels()], (
        "not 0.0000, which touches its neighbours"
    )


def test_a_row_without_a_speed_is_named_where_it_is_left_out(made, figures, tmp_path):
    table, runs = made
    write_speeds(runs[0].job.study, 0.52)
    found, _ = of(table, runs)
    assert without_speed(found) == ["ScMoE Pos-2 (L0 Pos-1), CG-1"]
    draw_equal_time(found, tmp_path / "chart.png")
    assert "L0 Pos-1" in figures[0].get_suptitle()
    assert (
        "L0 Pos-1"
        in markdown(found).partition("## Quality at equal time")[2].partition("val_loss:")[0]
    )


def test_a_difference_is_decided_by_its_corrected_p(made):
    table, runs = made
    for run in runs:
        ahead = 0.05 if run.row.name == POS2 else 0.002
        noise = Random(f"{run.row.name}{run.seed}").uniform(-0.003, 0.003)
        run.job.state = state_of(
            4.0 + run.seed - (0 if run.row.is_baseline else ahead) + noise, run.digest
        )
    found, rows = of(table, runs)
    minus = rows[POS2]["minus_baseline"]
    assert minus["decided"] and minus["p"] < 0.05 and minus["high"] < 0
    assert not rows[POS1]["minus_baseline"]["decided"]
    assert (
        f"val_loss: decided (corrected p < 0.05): {POS2} is below top-2. Not decided: shared"
        in markdown(found)
    )


def test_a_row_without_a_run_is_empty(made):
    table, runs = made
    for run in runs:
        if run.row is table.rows[1] or run.seed > 1:
            run.job.state = State()
    found, rows = of(table, runs)
    assert (
        rows["shared-expert, CG-2"]["ours"]["n"],
        rows["shared-expert, CG-2"]["params_total"],
    ) == (0, None)
    one = rows["ScMoE Pos-2, Direct Add"]
    assert (one["ours"]["std"], one["minus_baseline"]["mean"]) == (None, pytest.approx(0.022))
    assert (one["minus_baseline"]["low"], one["minus_baseline"]["p"]) == (None, None)
    text = markdown(found)
    assert "mean nothing" in text, "it is the scale smoke"
    assert "| shared-expert, CG-2 |  | 3.2406 | -0.0298 | (0) |  |  | (0) |" in text
    write_report(table, "smoke", runs, "")


def test_at_equal_time_the_fastest_row_is_at_its_end_and_slower_ones_are_earlier(made):
    """Pos-3 is fastest, at 1.6. When it ends, top-2 has made 4 / 1.6 = 2.5 of 4 steps: its loss is
    0.15 higher."""
    table, runs = made
    for run in runs:
        run.job.state = state_of(5.0 + run.seed / 10, run.digest)
    write_speeds(runs[0].job.study, 0.52)
    results_of_all, _ = of(table, runs)
    found = results_of_all["equal_time"]
    assert list(found) == ["equal_tokens", "0.52"], "0.15 has not been measured"
    assert found["0.52"]["two_batches"]
    at_time = found["0.52"]["rows"]
    assert at_time[POS3]["loss"]["mean"] == pytest.approx(5.2)
    assert at_time["top-2"]["loss"]["mean"] == pytest.approx(5.2 + 0.15)
    assert at_time[POS3]["minus_baseline"]["mean"] == pytest.approx(-0.15)
    assert found["equal_tokens"]["rows"][POS3]["minus_baseline"]["mean"] == pytest.approx(0)
    assert "ScMoE Pos-2 (L0 Pos-1), CG-1" not in at_time, "the testbed has no such row"
    assert "Speed-ups at a share of 0.52 (0.53 as measured)" in markdown(results_of_all)


def test_a_rival_with_two_batches_in_flight_is_compared_at_its_own_speed(made):
    """Pos-3 is fastest, at 1.6, and top-2 with two batches has 1.5: 3.75 of 4 steps."""
    table, runs = made
    for run in runs:
        run.job.state = state_of(5.0 + run.seed / 10, run.digest)
    study = runs[0].job.study
    write_speeds(study, 0.52)
    path = next((study / "speed").glob("*.json"))
    report = json.loads(path.read_text())
    report["rows"]["top2_two"]["train_speedup"] = 1.5
    path.write_text(json.dumps(report))
    found, _ = of(table, runs)
    at_time = found["equal_time"]["0.52"]["rows"]
    assert at_time["top-2"]["speed"] == 1.5
    assert at_time["top-2"]["loss"]["mean"] == pytest.approx(5.2 + 0.025)
    assert "two batches in flight" in markdown(found)


def test_speeds_stand_beside_the_papers_and_a_missing_one_says_why(tmp_path):
    table, runs = planned_of("table1", tmp_path, 1)
    for run in runs:
        run.job.state = state_of(5.0, run.digest, val_accuracy=0.5)
    _, rows = of(table, runs)
    assert rows["ScMoE Pos-2"]["others"]["training speed-up"]["ours"]["why"].startswith(
        "not measured"
    )
    write_speeds(runs[0].job.study, 0.52)
    found, rows = of(table, runs)
    own = rows["ScMoE Pos-2"]["others"]["training speed-up"]["ours"]
    assert (own["mean"], own["quartiles"], own["n"], own["links"]) == (1.5, [1.1, 1.9], 9, "shaped")
    assert found["rows"][0]["ours"]["mean"] == 50.0, (
        "a share of images is shown in percent, as in the paper"
    )
    row = (
        "| ScMoE Pos-2 | paper 1.43; ours 1.50 [1.10, 1.90] | paper 1.66; ours 1.75 [1.10, 2.00] |"
    )
    assert row in markdown(found)


def test_no_report_is_made_over_runs_that_have_read_different_data(tmp_path, capsys):
    """The text behind data.path was edited between two calls. The kept states of Tables 1 and 7 do
    not say what was read."""
    plan = plan_table(
        load_table("table4", CONFIGS), TableOptions(seeds=1), [f"runs_dir={tmp_path}"]
    )
    for i, run in enumerate(plan.runs):
        results = {"digest": run.digest, "summary": {}, "data": (None, "old", "new", "new")[i]}
        run.job.state = State("finished", "/somewhere", results=results)
        run.job.keep()
    made = make_table(plan)
    assert (made.finished, made.failed, *plan.folder.glob("table.md")) == (4, 1)
    assert capsys.readouterr().err.endswith(f"; remove {plan.runs[1].job.state_file}\n")


def test_sizes_are_compared_with_their_own_baseline(tmp_path):
    table, runs = planned_of("table6", tmp_path, 2)
    for run in runs:
        large = run.config.model.dim == 16
        run.job.state = state_of(5.0, run.digest, val_accuracy=0.6 if large else 0.5)
    found, rows = of(table, runs)
    assert {rows[f"ScMoE Pos-2, {size}"]["minus_baseline"]["mean"] for size in "SB"} == {0.0}
    assert rows["ScMoE Pos-2, B"]["paper"]["difference"] == pytest.approx(80.56 - 80.48)
    assert rows["DGMoE-Share Pos-2, S"]["paper"]["difference"] == pytest.approx(78.45 - 79.33)
    assert found["comparisons"] == 9
