"""This module makes runs of the paper's tables, and what they have left, without training."""

import json
from pathlib import Path

from experiments.bench.pairs import usual_rows
from experiments.tables.results import results
from experiments.tables.table_file import PaperTable, load_table
from experiments.tables.table_runs import Run, plan_runs
from scmoe.sweeps.jobs import State

CONFIGS = Path(__file__).parents[2] / "configs/experiment"
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


def results_by_row(table: PaperTable, runs: list[Run]) -> tuple[dict, dict]:
    """Return the results, and their rows by name."""
    found = results(table, "smoke", runs, "make table TABLE=table3 SCALE=smoke")
    return found, {row["name"]: row for row in found["rows"]}


def planned_of(name: str, folder: Path, seeds: int) -> tuple[PaperTable, list[Run]]:
    table = load_table(name, CONFIGS)
    runs = plan_runs(table, table.scales["smoke"], folder / f"{name}-smoke", seeds)
    runs[0].job.study.mkdir()
    return table, runs
