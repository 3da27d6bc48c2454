"""What comes out of a table: results.json, table.md and chart.png, ours beside the paper's.

A difference to the baseline row is taken seed by seed, since rows with the same seed see the same tokens and begin with
the same weights; the test is Student's t on these differences (scipy's ttest_rel), two-sided and not corrected for the
number of rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from experiments.harness import clock
from experiments.table_config import Row, Table
from experiments.table_runs import Run, State

PAPER, OURS, SEED = "#8a817c", "#1b6ca8", "#9cc4e4"


def write_report(table: Table, scale: str, states: Mapping[Run, State]) -> list[Path]:
    """The three files of a table with at least one finished run, as far as its runs have come."""
    folder = next(iter(states)).folder
    found = results(table, scale, states)
    (folder / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "table.md").write_text(markdown(found))
    draw(found, folder / "chart.png")
    return [folder / name for name in ("table.md", "results.json", "chart.png")]


# ---------------------------------------------------------------------- numbers


def describe(values: Mapping[int, float]) -> dict[str, Any]:
    """mean, std (of a sample; null for one value) and n of values by seed."""
    n = len(values)
    mean = math.fsum(values.values()) / n if n else None
    std = (
        math.sqrt(math.fsum((v - mean) ** 2 for v in values.values()) / (n - 1)) if mean is not None and n > 1 else None
    )
    return {"mean": mean, "std": std, "n": n}


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, Any]:
    """Differences over the seeds that both have: mean, std, n, the 95 % interval of the mean, and p of the paired test.

    Interval and p are null for fewer than two pairs and for differences that are all the same.
    """
    seeds = sorted(values.keys() & baseline.keys())
    by_seed = {seed: values[seed] - baseline[seed] for seed in seeds}
    found = {**describe(by_seed), "interval_95": None, "p": None, "by_seed": by_seed}
    if len(set(by_seed.values())) > 1:
        test = stats.ttest_rel([values[s] for s in seeds], [baseline[s] for s in seeds])
        found |= {"interval_95": [float(end) for end in test.confidence_interval()], "p": float(test.pvalue)}
    return found


def results(table: Table, scale: str, states: Mapping[Run, State]) -> dict[str, Any]:
    metric = table.metric
    values: dict[Row, dict[int, float]] = {row: {} for row in table.rows}
    for run, state in states.items():
        if state.status == "finished" and state.summary:
            values[run.row][run.seed] = state.summary[metric]
    rows = []
    for row in table.rows:
        own = {run: state for run, state in states.items() if run.row is row}
        summaries = [state.summary for state in own.values() if state.summary]
        rows.append(
            {
                "name": row.name,
                "groups": list(row.groups),
                "overrides": list(row.overrides),
                "params_total": summaries[0].get("params_total") if summaries else None,
                "params_active": summaries[0].get("params_active") if summaries else None,
                "paper": {metric: row.paper, "difference": round(row.paper - table.baseline.paper, 6)},
                "ours": {**describe(values[row]), "by_seed": values[row]},
                "difference": None if row is table.baseline else compare(values[row], values[table.baseline]),
                "failed": {run.seed: state.error for run, state in own.items() if state.status == "failed"},
                "unfinished": [run.seed for run, state in own.items() if state.status not in ("finished", "failed")],
                "run_dirs": [state.run_dir for state in own.values() if state.run_dir],
            }
        )
    return {
        "table": table.name,
        "title": table.title,
        "scale": scale,
        "metric": metric,
        "unit": table.unit,
        "baseline": table.baseline.name,
        **_circumstances(states),
        "rows": rows,
    }


def _circumstances(states: Mapping[Run, State]) -> dict[str, Any]:
    """Where, when and with what the runs were made."""
    run = next(iter(states))
    data, model, trainer = run.config.data, run.config.model, run.config.trainer
    images, sequences = model.family == "swin", trainer.max_steps * data.global_batch_size
    done = [state for state in states.values() if state.status == "finished"]
    environments = [json.loads((Path(str(s.run_dir)) / "env.json").read_text()) for s in done]
    return {
        "command": f"make {run.folder.name.partition('-')[0]} SCALE={run.folder.name.partition('-')[2]}",
        "config": str(run.config_file),
        "model": f"{model.layers} layers, width {model.dim}, {run.config.moe.num_experts} experts",
        "steps": trainer.max_steps,
        f"{'images' if images else 'tokens'}_per_run": sequences * (1 if images else data.seq_len),
        "seen": f"{sequences:,} images a run" if images else f"{sequences * data.seq_len:,} tokens a run",
        "runs": {status: sum(s.status == status for s in states.values()) for status in ("finished", "failed")},
        "seconds_of_all_runs": round(sum(state.seconds for state in states.values()), 1),
        "machines": sorted({f"{e['cpus']} CPU cores, {e['platform'].partition('-')[0]}" for e in environments}),
        "torch": sorted({e["packages"]["torch"] for e in environments}),
        "git_commits": sorted({str(e["git_commit"]) for e in environments}),
        "dates": sorted({Path(str(s.run_dir)).name[:8] for s in done}),
    }


# ---------------------------------------------------------------------- table.md


def markdown(found: Mapping[str, Any]) -> str:
    """A part for each group of rows; a row that belongs to two is shown in both."""
    baseline = found["baseline"]
    minus = f"minus {baseline}"
    head = (
        f"| row | parameters (active) | paper | paper: {minus} | ours: mean ± std (n) | ours: {minus} | 95 % interval "
        "| p (n) |"
    )
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
    if order := _order(found):
        lines += ["", order]
    lines += [
        "",
        f"`{found['command']}` ({found['config']}), {clock(found['seconds_of_all_runs'])} of runs, "
        f"{', '.join(found['machines'])}, torch {', '.join(found['torch'])}, commit {', '.join(found['git_commits'])}.",
    ]
    missing = [
        f"{row['name']}: {len(row['failed'])} failed, {len(row['unfinished'])} to be made"
        for row in found["rows"]
        if row["failed"] or row["unfinished"]
    ]
    return "\n".join([*lines, *(["", "Not whole: " + "; ".join(missing) + "."] if missing else [])]) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    paper, ours, difference = row["paper"], row["ours"], row["difference"]
    value = next(iter(paper.values()))
    size = f"{row['params_total'] / 1e6:.2f}M ({row['params_active'] / 1e6:.2f}M)" if row["params_total"] else ""
    cells = [row["name"], size, f"{value:.4f}", f"{paper['difference']:+.4f}" if difference else "", _spread(ours)]
    if difference is None:
        cells += ["", "", ""]
    else:
        low_high, p = difference["interval_95"], difference["p"]
        cells += [
            "" if difference["mean"] is None else f"{difference['mean']:+.4f}",
            "" if low_high is None else f"{low_high[0]:+.4f} to {low_high[1]:+.4f}",
            f"{'' if p is None else f'{p:.3f} ' if p >= 0.001 else '< 0.001 '}({difference['n']})",
        ]
    return f"| {' | '.join(cells)} |"


def _spread(ours: Mapping[str, Any]) -> str:
    if ours["mean"] is None:
        return "(0)"
    return f"{ours['mean']:.4f}" + ("" if ours["std"] is None else f" ± {ours['std']:.4f}") + f" ({ours['n']})"


def _order(found: Mapping[str, Any]) -> str:
    """Do the rows come in the paper's order?"""
    pairs = [(row["paper"][found["metric"]], row["ours"]["mean"]) for row in found["rows"]]
    if len(pairs) < 3 or any(ours is None for _, ours in pairs):
        return ""
    test = stats.spearmanr(*zip(*pairs, strict=True))
    return (
        f"Order of the {len(pairs)} rows, ours against the paper's: Spearman's rank correlation {test.statistic:+.2f} "
        f"(p {test.pvalue:.2f})."
    )


# ---------------------------------------------------------------------- chart.png


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Differences to the baseline, the paper's and ours: a dot for each seed, their mean and its interval."""
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
        axis.set_xlabel(f"minus {found['baseline']}, {found['unit']}")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    handles = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"{found['title']}: difference to {found['baseline']} (left is better; scales differ)", fontsize=12)
    figure.savefig(path, dpi=150)


def _label(axis: Axes, text: str, x: float, y: float) -> None:
    axis.annotate(text, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8, color="#444444")
