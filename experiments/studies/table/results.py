"""A table's results.json: for each row the paper's values, ours over seeds, and the differences to its baseline.

ours, minus_baseline   of the first metric, which decides; `others` has the same for each other metric
power                  how many seeds a difference of the paper's size needs, by the measured spread
equal_time             losses at equal time (equal_time.py), where the table's file asks for them
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scmoe.experiments.studies.table.equal_time import at_equal_time
from scmoe.experiments.studies.table.kept import look_up
from scmoe.experiments.studies.table.rows import Metric, Row, Table
from scmoe.experiments.studies.table.speeds import read_speeds
from scmoe.experiments.studies.table.statistics import ALPHA, compare, describe, holm, pooled, seeds_needed
from scmoe.experiments.studies.table.table_runs import Run

Values = Mapping[int, float]  # by seed


def results(table: Table, scale: str, runs: Sequence[Run], command: str) -> dict[str, Any]:
    """Return what results.json holds, as far as the runs have come. command: the one that makes the table."""
    speeds = read_speeds(runs[0].job.study)
    finished = [run for run in runs if run.state.status == "finished"]
    columns = {metric.name: _column(table, metric, finished, speeds) for metric in table.metrics}
    first = table.decides
    rows = [_row(table, row, [run for run in runs if run.row is row], columns) for row in table.rows]
    return {
        "table": table.name,
        "title": table.title,
        "scale": scale,
        "metric": first.name,
        "unit": first.unit,
        "metrics": {m.name: {"unit": m.unit, "better": m.better, "from": m.source} for m in table.metrics},
        "comparisons": table.comparisons,
        "command": command,
        **_circumstances(runs),
        "speeds": {f"{share:g}": _of_testbed(report) for share, report in speeds.items()},
        "power": _power(table, columns[first.name]),
        "rows": rows,
        "equal_time": at_equal_time(table, finished, speeds),
    }


def _column(
    table: Table, metric: Metric, finished: Sequence[Run], speeds: Mapping[float, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return {ours, minus_baseline} of one metric by the row's name."""
    if metric.source == "speed":
        report = speeds.get(table.share or 0.0)
        return {row.name: {"ours": _speed(metric, row, report), "minus_baseline": None} for row in table.rows}
    values: dict[str, dict[int, float]] = {row.name: {} for row in table.rows}
    for run in finished:
        found = [look_up(run.state.results.get(metric.source), key) for key in metric.keys]
        numbers = [number for number in found if number is not None]
        if len(numbers) == len(metric.keys):
            values[run.row.name][run.seed] = metric.times * sum(numbers) / len(numbers)
    compared = [row for row in table.rows if not row.is_baseline]
    minus = {r.name: compare(values[r.name], values[r.baseline], table.comparisons) for r in compared}
    for row, p in zip(compared, holm([minus[r.name]["p"] for r in compared], table.comparisons), strict=True):
        minus[row.name] |= {"p": p, "decided": p is not None and p < ALPHA}
    return {
        name: {"ours": {**describe(of), "by_seed": of}, "minus_baseline": minus.get(name)}
        for name, of in values.items()
    }


def _speed(metric: Metric, row: Row, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a speed-up of the row's architecture over sequential top-2, with quartiles over rounds, or why there is
    none. A mean over seeds does not exist: the testbed measures an architecture, not a run."""
    if row.speed is None:
        return {"mean": None, "n": 0, "why": "the testbed has no such row"}
    if report is None:
        return {"mean": None, "n": 0, "why": "not measured at this scale, or the measurement failed"}
    (key,) = metric.keys
    measured = report["rows"][row.speed]
    facts = {name: measured[name] for name in ("links", "compute")} | {"share": report["comm_share"]}
    quartiles = measured[key.replace("speedup", "quartiles")]
    return {"mean": measured[key], "quartiles": quartiles, "n": report["rounds"], **facts}


def _row(
    table: Table, row: Row, runs: Sequence[Run], columns: Mapping[str, Mapping[str, dict[str, Any]]]
) -> dict[str, Any]:
    summary: dict[str, Any] = next((run.state.results["summary"] for run in runs if run.state.results), {})
    first, *others = table.metrics
    return {
        "name": row.name,
        "groups": list(row.groups),
        "overrides": list(row.overrides),
        "baseline": row.baseline,
        "params_total": summary.get("params_total"),
        "params_active": summary.get("params_active"),
        "paper": {**row.paper, "difference": _paper_difference(table, row)},
        **columns[first.name][row.name],
        "others": {metric.name: columns[metric.name][row.name] for metric in others},
        "failed": {run.seed: run.state.error for run in runs if run.state.status == "failed"},
        "unfinished": [run.seed for run in runs if run.state.status not in ("finished", "failed")],
        "run_dirs": [run.state.run_dir for run in runs if run.state.run_dir],
    }


def _paper_difference(table: Table, row: Row) -> float | None:
    """Return the paper's difference to the row's baseline in the first metric; None where it has not both."""
    name, baseline = table.decides.name, table.row(row.baseline)
    if name not in row.paper or name not in baseline.paper:
        return None
    return round(row.paper[name] - baseline.paper[name], 6)


def _power(table: Table, column: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return how many seeds the smallest and the largest of the paper's differences need, by the spread of ours."""
    stds = [own["minus_baseline"]["std"] for own in column.values() if own["minus_baseline"]]
    known = [std for std in stds if std is not None]
    differences = [abs(d) for row in table.rows if (d := _paper_difference(table, row)) and not row.is_baseline]
    if not differences or not any(known):
        return None
    asked = dict.fromkeys(float(f"{difference:.2g}") for difference in (min(differences), max(differences)))
    needed = {f"{d:g}": seeds_needed(pooled(known), d, table.comparisons) for d in asked}
    return {"pooled_std": pooled(known), "largest_std": max(known), "seeds_needed": needed}


def _circumstances(runs: Sequence[Run]) -> dict[str, Any]:
    """Return where, when and with which versions the runs ran."""
    config = runs[0].config
    data, trainer = config.data, config.trainer
    unit, samples = "images" if config.model.family == "swin" else "tokens", trainer.max_steps * data.global_batch_size
    seen = samples if unit == "images" else samples * data.seq_len
    models = dict.fromkeys(
        f"{run.config.model.layers} layers, width {run.config.model.dim}, {run.config.moe.num_experts} experts"
        for run in runs
    )
    done = [run.state.results for run in runs if run.state.status == "finished"]
    environments = [kept["environment"] for kept in done]
    return {
        "config": runs[0].job.arguments[0],
        "data": data.name,
        "model": "; ".join(models),
        "steps": trainer.max_steps,
        f"{unit}_per_run": seen,
        "seen": f"{seen:,} {unit} a run",
        "runs": {status: sum(run.state.status == status for run in runs) for status in ("finished", "failed")},
        "taken_from": dict(Counter(kept["from"] for kept in done if "from" in kept)),
        "seconds_of_all_runs": round(sum(run.state.seconds for run in runs), 1),
        "machines": sorted({environment["machine"] for environment in environments}),
        "torch": sorted({environment["torch"] for environment in environments}),
        "git_commits": sorted({str(environment["git_commit"]) for environment in environments}),
        "dates": sorted({environment["date"] for environment in environments}),
    }


def _of_testbed(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reader must know of a measurement of speeds."""
    names = ("comm_share", "link_mbit", "ranks", "compute", "level", "rounds", "limit_forward", "limit_train")
    return {name: report[name] for name in names} | {"links": next(iter(report["rows"].values()))["links"]}
