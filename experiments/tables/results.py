"""A table's results.json: for each row the paper's values, ours over seeds, and the differences to
its baseline.

ours, minus_baseline   of the first metric, which decides; `others` has the same for each other
                       metric
equal_time             losses at equal time, where the table's file asks for them: what a row's
                       speed is worth
decision               of a registered experiment: an answer for each pair of rows; such a table has
                       no minus_baseline
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any

from experiments.tables.equal_time import Report, compare_at_equal_time
from experiments.tables.equivalence import equivalences
from experiments.tables.seed_statistics import describe, differences
from experiments.tables.table_file import Metric, PaperTable, TableRow
from experiments.tables.table_runs import Run, finished, look_up
from experiments.tables.table_speeds import read_speeds
from scmoe.config.derived import max_steps

LAST_LOSSES = 4  # of a run's curve, whose mean is a metric from `curve`


def results(table: PaperTable, scale: str, runs: Sequence[Run], command: str) -> dict[str, Any]:
    """Return what results.json holds, as far as the runs have come. command: the one that makes the
    table."""
    speeds = read_speeds(table, runs[0].job.study)
    done = finished(runs)
    columns = {metric.name: _column(table, metric, done, speeds) for metric in table.metrics}
    first = table.decides
    rows = [
        _row(table, row, [run for run in runs if run.row is row], columns) for row in table.rows
    ]
    content = {
        "table": table.name,
        "title": table.title,
        "scale": scale,
        "metric": first.name,
        "unit": first.unit,
        "metrics": {
            m.name: {"unit": m.unit, "better": m.better, "from": m.source} for m in table.metrics
        },
        "comparisons": table.comparisons,
        "command": command,
        **_circumstances(runs),
        "speeds": {f"{share:g}": _of_testbed(report) for share, report in speeds.items()},
        "rows": rows,
        "equal_time": compare_at_equal_time(table, done, speeds),
    }
    if table.decision is not None:
        values = {row.name: columns[first.name][row.name]["ours"]["by_seed"] for row in table.rows}
        content["decision"] = equivalences(table.decision, values, _ended(table, runs))
    return content


def _ended(table: PaperTable, runs: Sequence[Run]) -> dict[str, list[int]]:
    """Return the seeds of each row, in order, up to the first one whose run has not ended. A run
    that has failed once is tried again."""

    def is_over(run: Run) -> bool:
        state = run.state
        return state.status == "finished" or (state.status == "failed" and state.failures > 1)

    ended = {}
    for row in table.rows:
        of_row = [run for run in runs if run.row is row]
        over = takewhile(is_over, of_row)
        ended[row.name] = [run.seed for run in over]
    return ended


def _column(
    table: PaperTable, metric: Metric, done: Sequence[Run], speeds: Mapping[float, Report]
) -> dict[str, dict[str, Any]]:
    """Return {ours, minus_baseline} of one metric by the row's name."""
    if metric.source == "speed":
        report = speeds.get(table.share or 0.0)
        return {
            row.name: {"ours": _speed(metric, row, report), "minus_baseline": None}
            for row in table.rows
        }
    values: dict[str, dict[int, float]] = {row.name: {} for row in table.rows}
    for run in done:
        if (value := _value(metric, run)) is not None:
            values[run.row.name][run.seed] = value
    minus = {} if table.decision is not None else differences(table.rows, values)
    return {
        name: {"ours": {**describe(seeds), "by_seed": seeds}, "minus_baseline": minus.get(name)}
        for name, seeds in values.items()
    }


def _value(metric: Metric, run: Run) -> float | None:
    """Return the value that a finished run gives a metric; None: it lacks a part of it."""
    if metric.source == "curve":
        curve = run.state.results["curve"]
        return metric.times * fmean(loss for _, loss in curve[-LAST_LOSSES:])
    source = run.state.results.get(metric.source)
    numbers = [n for key in metric.keys if (n := look_up(source, key)) is not None]
    if len(numbers) < len(metric.keys):
        return None
    return metric.times * fmean(numbers)


def _speed(metric: Metric, row: TableRow, report: Report | None) -> dict[str, Any]:
    """Return a speed-up of the row's architecture over sequential top-2, with quartiles over
    rounds, or why there is none. A mean over seeds does not exist: the testbed measures an
    architecture, not a run."""
    if row.speed is None:
        return {"mean": None, "n": 0, "why": "the testbed has no such row"}
    if report is None:
        return {
            "mean": None,
            "n": 0,
            "why": "not measured at this scale, or the measurement failed",
        }
    (key,) = metric.keys
    measured = report["rows"][row.speed]
    return {
        "mean": measured[key],
        "quartiles": measured[key.replace("speedup", "quartiles")],
        "n": report["rounds"],
        "links": measured["links"],
        "compute": measured["compute"],
        "share": report["comm_share"],
    }


def _row(
    table: PaperTable,
    row: TableRow,
    runs: Sequence[Run],
    columns: Mapping[str, Mapping[str, dict[str, Any]]],
) -> dict[str, Any]:
    """Return what results.json holds of a row. runs: of the row. columns: by metric and row."""
    summary: dict[str, Any] = next(
        (run.state.results["summary"] for run in runs if run.state.results), {}
    )
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


def _paper_difference(table: PaperTable, row: TableRow) -> float | None:
    """Return the paper's difference to the row's baseline in the first metric; None where it has no
    value of one of them."""
    name, baseline = table.decides.name, table.row(row.baseline)
    if name not in row.paper or name not in baseline.paper:
        return None
    return round(row.paper[name] - baseline.paper[name], 6)


def _circumstances(runs: Sequence[Run]) -> dict[str, Any]:
    """Return where, when and with which versions the runs ran."""
    first, done = runs[0], finished(runs)
    models = dict.fromkeys(
        f"{run.config.model.layers} layers, width {run.config.model.dim},"
        f" {run.config.moe.num_experts} experts"
        for run in runs
    )
    environments = [run.state.results["environment"] for run in done]
    return {
        "config": first.job.arguments[0],
        "data": first.config.data.name,
        "model": "; ".join(models),
        "steps": max_steps(first.config),
        f"{first.unit}_per_run": first.seen,
        "seen": f"{first.seen:,} {first.unit} a run",
        "runs": {
            "finished": len(done),
            "failed": sum(run.state.status == "failed" for run in runs),
        },
        "seconds_of_all_runs": round(sum(run.state.seconds for run in runs), 1),
        "machines": sorted({environment["machine"] for environment in environments}),
        "torch": sorted({environment["torch"] for environment in environments}),
        "git_commits": sorted({str(environment["git_commit"]) for environment in environments}),
        "dates": sorted({environment["date"] for environment in environments}),
    }


def _of_testbed(report: Report) -> dict[str, Any]:
    """Return the conditions under which speeds were measured."""
    names = (
        "comm_share",
        "link_mbit",
        "ranks",
        "compute",
        "level",
        "rounds",
        "limit_forward",
        "limit_train",
    )
    rows = report["rows"]
    links = next(iter(rows.values()))["links"]
    others = {"links": links, "every": report.get("every", 2), "top_k": report.get("top_k", 1)}
    if "top2_two" in rows:
        in_halves = rows["top2_two"]
        others["top2_in_halves"] = [in_halves["train_speedup"], in_halves["forward_speedup"]]
    if "layers" in report:  # earlier versions measured one pair
        others["layers"] = report["layers"]
    return {name: report[name] for name in names} | others
