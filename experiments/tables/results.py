"""A table's results.json: for each row the paper's values, ours over seeds, and the differences to
its baseline.

ours, minus_baseline   of the first metric, which decides; `others` has the same for each other
                       metric
equal_time             losses at equal time, where the table's file asks for them: what a row's
                       speed is worth

A difference is taken seed by seed, since rows with the same seed see the same data and start with
the same weights; the test is Student's t on these differences, two-sided. A table compares several
rows, so its numbers are corrected:

    p          Holm's step-down correction over the table's comparisons
    low, high  Bonferroni's simultaneous intervals: each at 1 - 0.05 / comparisons, together they
               hold at 95 %

Holm decides a little more than Bonferroni, so a difference can be decided while its interval just
touches 0.

Equal time: a row that is x times as fast as sequential top-2 makes its steps in 1/x of the time. At
the time at which the fastest row ends, a row of speed x has made steps * x / max(x) of its steps;
its loss there is read off its own validation curve, between two validations on a straight line. The
learning rate of every row decays over all its steps, so a slower row is compared before the end of
its decay: a schedule made for the shorter run would bring it closer.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy

from experiments.tables.table_file import Metric, Row, Table
from experiments.tables.table_runs import Run, finished, look_up

ALPHA = 0.05
ROUNDING = 1e-9  # differences that vary by less than this share of the values are equal
SPEED = "train_speedup"  # of one pair of blocks, forward and backward, over sequential top-2
Values = Mapping[int, float]  # by seed
Report = Mapping[str, Any]  # of `bench overlap`


def read_speeds(table: Table, folder: Path) -> dict[float, dict[str, Any]]:
    """Return the reports of `bench overlap` by share, as its files in <folder>/speed/ are named.
    One that lacks a row of the table is left out: it is to be measured again."""
    wanted, found = {row.speed for row in table.rows if row.speed is not None}, {}
    for path in sorted((folder / "speed").glob("*-share-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if wanted <= report["rows"].keys():
            found[share_of(path)] = report
    return found


def share_of(path: Path) -> float:
    """Return the share in the name of a report, which may have more after it, such as `-every-1`."""
    return float(path.stem.rpartition("-share-")[2].partition("-")[0])


def results(table: Table, scale: str, runs: Sequence[Run], command: str) -> dict[str, Any]:
    """Return what results.json holds, as far as the runs have come. command: the one that makes the
    table."""
    speeds = read_speeds(table, runs[0].job.study)
    done = finished(runs)
    columns = {metric.name: _column(table, metric, done, speeds) for metric in table.metrics}
    first = table.decides
    rows = [
        _row(table, row, [run for run in runs if run.row is row], columns) for row in table.rows
    ]
    return {
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
        "equal_time": at_equal_time(table, done, speeds),
    }


def _column(
    table: Table, metric: Metric, done: Sequence[Run], speeds: Mapping[float, Report]
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
        found = [look_up(run.state.results.get(metric.source), key) for key in metric.keys]
        numbers = [number for number in found if number is not None]
        if len(numbers) == len(metric.keys):
            values[run.row.name][run.seed] = metric.times * sum(numbers) / len(numbers)
    minus = differences(table.rows, values)
    return {
        name: {"ours": {**describe(of), "by_seed": of}, "minus_baseline": minus.get(name)}
        for name, of in values.items()
    }


def differences(rows: Sequence[Row], values: Mapping[str, Values]) -> dict[str, dict[str, Any]]:
    """Return the differences of rows to their baselines by name: as of `compare`, p corrected, and
    whether they are decided. values: by the row's name; a row that has none, or whose baseline has
    none, is left out.
    """
    compared = [r for r in rows if not r.is_baseline and r.name in values and r.baseline in values]
    minus = {r.name: compare(values[r.name], values[r.baseline], len(compared)) for r in compared}
    for own, p in zip(
        minus.values(), holm([own["p"] for own in minus.values()], len(compared)), strict=True
    ):
        own["p"] = p
        own["decided"] = p is not None and p < ALPHA
    return minus


def _speed(metric: Metric, row: Row, report: Report | None) -> dict[str, Any]:
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
    facts = {name: measured[name] for name in ("links", "compute")} | {
        "share": report["comm_share"]
    }
    quartiles = measured[key.replace("speedup", "quartiles")]
    return {"mean": measured[key], "quartiles": quartiles, "n": report["rounds"], **facts}


def _row(
    table: Table, row: Row, runs: Sequence[Run], columns: Mapping[str, Mapping[str, dict[str, Any]]]
) -> dict[str, Any]:
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


def _paper_difference(table: Table, row: Row) -> float | None:
    """Return the paper's difference to the row's baseline in the first metric; None where it has
    not both."""
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
        "steps": first.config.trainer.max_steps,
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
    """Return what a reader must know of a measurement of speeds."""
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
    links = next(iter(report["rows"].values()))["links"]
    others = {"links": links, "every": report.get("every", 2), "top_k": report.get("top_k", 1)}
    return {name: report[name] for name in names} | others


def at_equal_time(
    table: Table, done: Sequence[Run], speeds: Mapping[float, Report]
) -> dict[str, dict[str, Any]]:
    """Return {share of communication, as text: {comm_share, rows}}. rows: for each row that has a
    speed, its speed, the step reached, the loss at that step over seeds and its difference to the
    baseline. `equal_tokens`: all speeds are 1.

    Empty if the table's file has no equal_time. A share without measured speeds is left out.
    """
    if not table.equal_time:
        return {}
    measured = {row.name: row.speed for row in table.rows if row.speed is not None}
    found = {
        "equal_tokens": {
            "comm_share": 0.0,
            "rows": _at_speeds(table, done, dict.fromkeys(measured, 1.0)),
        }
    }
    for share in table.equal_time:
        if share in speeds:
            of_rows = {
                name: speeds[share]["rows"][speed][SPEED] for name, speed in measured.items()
            }
            rows = _at_speeds(table, done, of_rows)
            found[f"{share:g}"] = {"comm_share": speeds[share]["comm_share"], "rows": rows}
    return found


def _at_speeds(
    table: Table, done: Sequence[Run], speeds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Return speed, step, loss and minus_baseline by row. speeds: by row."""
    losses: dict[str, dict[int, float]] = {name: {} for name in speeds}
    steps = {name: 0.0 for name in speeds}
    for run in done:
        if (name := run.row.name) in speeds:
            steps[name] = step_reached(
                run.config.trainer.max_steps, speeds[name], max(speeds.values())
            )
            loss = loss_at(run.state.results["curve"], steps[name])
            if loss is not None:
                losses[name][run.seed] = loss
    minus = differences(table.rows, losses)
    return {
        name: {
            "speed": speeds[name],
            "step": round(steps[name]),
            "loss": {**describe(losses[name]), "by_seed": losses[name]},
            "minus_baseline": minus.get(name),
        }
        for name in speeds
    }


def step_reached(steps: int, speed: float, fastest: float) -> float:
    """Return how many of its steps a row has made when the fastest one ends, which has made exactly
    all."""
    return steps * (speed / fastest)


def loss_at(curve: Sequence[Sequence[float]], step: float) -> float | None:
    """Return the loss at a step, between two points of the curve on a straight line; None outside
    the curve."""
    if not curve or not curve[0][0] <= step <= curve[-1][0]:
        return None
    steps, losses = zip(*curve, strict=True)
    return float(numpy.interp(step, steps, losses))


def describe(values: Mapping[int, float]) -> dict[str, Any]:
    """Return mean, std (of a sample; None for one value), n, median and range of values by seed."""
    n, all_values = len(values), list(values.values())
    if n == 0:
        return {"mean": None, "std": None, "n": 0, "median": None, "range": None}
    return {
        "mean": fmean(all_values),
        "std": stdev(all_values) if n > 1 else None,
        "n": n,
        "median": median(all_values),
        "range": [min(all_values), max(all_values)],
    }


def compare(
    values: Mapping[int, float], baseline: Mapping[int, float], comparisons: int = 1
) -> dict[str, Any]:
    """Return the differences over the seeds that both have: mean, std, n, interval (low, high), p
    and by_seed.

    comparisons: of the table, by which the interval is widened; p is corrected by `holm`, over all
    rows at once. low, high and p are None for fewer than two pairs and for differences that are all
    equal.
    """
    from scipy import stats

    by_seed = {
        seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())
    }
    facts = describe(by_seed)
    found = {name: facts[name] for name in ("mean", "std", "n")} | {
        "low": None,
        "high": None,
        "p": None,
    }
    spread = max(by_seed.values(), default=0.0) - min(by_seed.values(), default=0.0)
    # accuracies have few values: their differences can be equal but for rounding, which a test
    # would take for certainty
    if spread > ROUNDING * max(map(abs, [*values.values(), *baseline.values()]), default=0.0):
        test = stats.ttest_1samp(list(by_seed.values()), 0.0)
        interval = test.confidence_interval(1 - ALPHA / comparisons)
        found |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    return {**found, "by_seed": by_seed}


def holm(ps: Sequence[float | None], comparisons: int) -> list[float | None]:
    """Return the p-values corrected for that many comparisons by Holm's method; a None counts as
    one not yet made."""
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    for rank, (p, place) in enumerate(
        sorted((p, place) for place, p in enumerate(ps) if p is not None)
    ):
        least = max(least, min(1.0, p * (comparisons - rank)))
        corrected[place] = least
    return corrected
