"""What a table writes into its folder: results.json, table.md and chart.png, our values beside the paper's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scmoe.studies.progress import clock
from scmoe.studies.table.rows import Row, Table
from scmoe.studies.table.runs import Run
from scmoe.studies.table.statistics import compare, describe, rank_correlation

PAPER, OURS, SEED = "#8a817c", "#1b6ca8", "#9cc4e4"


def write_report(table: Table, scale: str, runs: Sequence[Run]) -> list[Path]:
    """Write the three files of a table that has at least one finished run, as far as its runs have come."""
    folder = runs[0].job.study
    found = results(table, scale, runs)
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "table.md").write_text(markdown(found))
    draw(found, folder / "chart.png")
    return [folder / name for name in ("table.md", "results.json", "chart.png")]


def results(table: Table, scale: str, runs: Sequence[Run]) -> dict[str, Any]:
    values: dict[Row, dict[int, float]] = {row: {} for row in table.rows}
    for run in runs:
        if run.state.status == "finished":
            values[run.row][run.seed] = run.state.results[table.metric]
    head = {"table": table.name, "title": table.title, "scale": scale, "metric": table.metric, "unit": table.unit}
    rows = [_row(table, row, [run for run in runs if run.row is row], values) for row in table.rows]
    return {**head, "baseline": table.baseline.name, **_circumstances(runs), "rows": rows}


def _row(table: Table, row: Row, runs: Sequence[Run], values: Mapping[Row, dict[int, float]]) -> dict[str, Any]:
    summary = next((run.state.results for run in runs if run.state.results), {})
    return {
        "name": row.name,
        "groups": list(row.groups),
        "overrides": list(row.overrides),
        "params_total": summary.get("params_total"),
        "params_active": summary.get("params_active"),
        "paper": {table.metric: row.paper, "difference": round(row.paper - table.baseline.paper, 6)},
        "ours": {**describe(values[row]), "by_seed": values[row]},
        "difference": None if row is table.baseline else compare(values[row], values[table.baseline]),
        "failed": {run.seed: run.state.error for run in runs if run.state.status == "failed"},
        "unfinished": [run.seed for run in runs if run.state.status not in ("finished", "failed")],
        "run_dirs": [run.state.run_dir for run in runs if run.state.run_dir],
    }


def _circumstances(runs: Sequence[Run]) -> dict[str, Any]:
    """Return where, when and with which versions the runs ran."""
    config, (name, _, scale) = runs[0].config, runs[0].job.study.name.partition("-")
    data, model, trainer = config.data, config.model, config.trainer
    unit, samples = "images" if model.family == "swin" else "tokens", trainer.max_steps * data.global_batch_size
    seen = samples if unit == "images" else samples * data.seq_len
    done = [Path(str(run.state.run_dir)) for run in runs if run.state.status == "finished"]
    environments = [json.loads((run_dir / "env.json").read_text()) for run_dir in done]
    return {
        "command": f"make {name} SCALE={scale}",
        "config": runs[0].job.arguments[0],
        "model": f"{model.layers} layers, width {model.dim}, {config.moe.num_experts} experts",
        "steps": trainer.max_steps,
        f"{unit}_per_run": seen,
        "seen": f"{seen:,} {unit} a run",
        "runs": {status: sum(run.state.status == status for run in runs) for status in ("finished", "failed")},
        "seconds_of_all_runs": round(sum(run.state.seconds for run in runs), 1),
        "machines": sorted({f"{e['cpus']} CPU cores, {e['platform'].partition('-')[0]}" for e in environments}),
        "torch": sorted({e["packages"]["torch"] for e in environments}),
        "git_commits": sorted({str(e["git_commit"]) for e in environments}),
        "dates": sorted({run_dir.name[:8] for run_dir in done}),
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Return a part for each group of rows; a row that belongs to two is shown in both."""
    minus = f"minus {found['baseline']}"
    columns = ["row", "parameters (active)", "paper", f"paper: {minus}", "ours: mean ± std (n)", f"ours: {minus}"]
    head = f"| {' | '.join([*columns, '95 % interval', 'p (n)'])} |"
    lines = [
        f"# {found['title']}",
        "",
        f"Scale `{found['scale']}`: {found['model']}, {found['seen']}, "
        f"{found['runs']['finished']} runs finished, {found['runs']['failed']} failed; {found['unit']}.",
        f"Differences are taken seed by seed; p is that of a paired t-test over seeds, two-sided, not corrected for "
        f"{len(found['rows']) - 1} rows.",
    ]
    for group in dict.fromkeys(group for row in found["rows"] for group in row["groups"]):
        lines += ["", f"## {group[0].upper()}{group[1:]}", "", head, "| --- |" + " ---: |" * 7]
        lines += [_line(row) for row in found["rows"] if group in row["groups"]]
    pairs = [(row["paper"][found["metric"]], row["ours"]["mean"]) for row in found["rows"]]
    if len(pairs) > 2 and all(ours is not None for _, ours in pairs):
        statistic, p = rank_correlation(pairs)
        order = f"Order of the {len(pairs)} rows, ours against the paper's: Spearman's rank correlation"
        lines += ["", f"{order} {statistic:+.2f} (p {p:.2f})."]
    lines += [
        "",
        f"`{found['command']}` ({found['config']}), {clock(found['seconds_of_all_runs'])} of runs, "
        f"{', '.join(found['machines'])}, torch {', '.join(found['torch'])}, commit {', '.join(found['git_commits'])}.",
    ]
    incomplete = (row for row in found["rows"] if row["failed"] or row["unfinished"])
    missing = [f"{row['name']}: {len(row['failed'])} failed, {len(row['unfinished'])} to run" for row in incomplete]
    lines += ["", f"Incomplete: {'; '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    paper, ours, difference = row["paper"], row["ours"], row["difference"]
    size = f"{row['params_total'] / 1e6:.2f}M ({row['params_active'] / 1e6:.2f}M)" if row["params_total"] else ""
    spread = _numbers(" ± ", "{:.4f}", ours["mean"], ours["std"])
    value, minus = f"{next(iter(paper.values())):.4f}", f"{paper['difference']:+.4f}" if difference else ""
    cells = [row["name"], size, value, minus, f"{spread} ({ours['n']})".strip()]
    if difference is None:
        return f"| {' | '.join([*cells, '', '', ''])} |"
    p = difference["p"]
    p_and_n = f"{'' if p is None else f'{p:.3f} ' if p >= 0.001 else '< 0.001 '}({difference['n']})"
    interval = _numbers(" to ", "{:+.4f}", *difference["interval_95"] or ())
    return f"| {' | '.join([*cells, _numbers('', '{:+.4f}', difference['mean']), interval, p_and_n])} |"


def _numbers(between: str, form: str, *values: float | None) -> str:
    """Return the values that are not None, with `between` between them."""
    return between.join(form.format(value) for value in values if value is not None)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the differences to the baseline, the paper's and ours: a dot for each seed, their mean and its interval."""
    rows = [row for row in found["rows"] if row["difference"] is not None]
    figure = Figure(figsize=(11, 1.8 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows), 0, -1)
    paper = [row["paper"]["difference"] for row in rows]
    left.hlines(places, 0, paper, color=PAPER, linewidth=1.5)
    left.plot(paper, places, "D", color=PAPER, markersize=7)
    for place, value in zip(places, paper, strict=True):
        _label(left, f"{value:+.4f}", value, place)
    left.margins(x=0.15)
    for row, place in zip(rows, places, strict=True):
        difference = row["difference"]
        if difference["mean"] is None:
            continue
        seeds = list(difference["by_seed"].values())
        right.plot(seeds, [place] * len(seeds), "o", color=SEED, markersize=6, label="one seed")
        if interval := difference["interval_95"]:
            right.hlines(place, *interval, color=OURS, linewidth=2, label="95 % interval of the mean")
        right.plot(difference["mean"], place, "D", color=OURS, markersize=7, label="mean")
        _label(right, f"{difference['mean']:+.4f}", difference["mean"], place)
    left.set_yticks(list(places), [row["name"] for row in rows])
    left.set_ylim(0.3, len(rows) + 0.9)
    ours = f"Ours, {found['scale']}: {found['model']},\n{found['seen']}"
    for axis, title in ((left, "Paper"), (right, ours)):
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=f"minus {found['baseline']}, {found['unit']}", axisbelow=True)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    handles = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{found['title']}: difference to {found['baseline']} (left is better; scales differ)", fontsize=12)
    figure.savefig(path, dpi=150)


def _label(axis: Axes, text: str, x: float, y: float) -> None:
    axis.annotate(text, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8, color="#444444")
