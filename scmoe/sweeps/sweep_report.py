"""What a sweep writes into its folder: results.csv, summary.md, chart.png and best.yaml."""

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from scmoe.charts import CHART_WIDTH, SMALL, chart, heading
from scmoe.config.as_yaml import to_yaml
from scmoe.config.load import load_config
from scmoe.report import Report
from scmoe.sweeps.search import Trial, best
from scmoe.sweeps.sweep_file import Sweep, words

NUMBERED_TRIALS = 12  # up to this many trials, the chart shows their numbers
CATEGORY_LETTERS = 40  # of all categories of a panel, on one line
TRIAL_COLORS = {"finished": "#1b6ca8", "failed": "#c1292e", "best": "#e09f3e"}
LABELS = {"finished": "finished", "failed": "failed"}


def write_report(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, Any]:
    """Write the files, as far as the trials have come. Return the summary."""
    with (sweep.folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["trial", "state", *sweep.axes, sweep.metric, "steps", "seconds", "run_dir", "reason"]
        )
        for t in trials:
            values = (t.parameters[name] for name in sweep.axes)
            rows.writerow(
                [
                    t.number,
                    t.state,
                    *values,
                    t.value,
                    t.steps,
                    round(t.seconds, 1),
                    t.run_dir,
                    t.reason,
                ]
            )
    (sweep.folder / "summary.md").write_text(
        f"# {table(sweep, trials).markdown()}\n![](chart.png)\n", encoding="utf-8"
    )
    draw(sweep, trials, sweep.folder / "chart.png")
    states, path = Counter(trial.state for trial in trials), sweep.folder / "best.yaml"
    counts = {"finished": states["finished"], "failed": states["failed"]}
    summary: dict[str, Any] = {"trials": len(trials), **counts, "best": None}
    if (first := best(sweep, trials)) is not None:
        config = load_config(sweep.config, [*sweep.overrides, *words(first.parameters)])
        origin = (
            f"# Trial {first.number} of the sweep {sweep.name}, {sweep.metric} {first.value:.6g}."
        )
        path.write_text(f"{origin}\n{to_yaml(config)}", encoding="utf-8")
        result = {"trial": first.number, sweep.metric: first.value, "parameters": first.parameters}
        summary["best"] = {**result, "run_dir": first.run_dir, "config": str(path)}
    return summary


def table(sweep: Sweep, trials: Sequence[Trial]) -> Report:
    """Return the trials, the best first, those without a result last."""
    sign = 1 if sweep.minimize else -1
    rows = {}
    for trial in sorted(
        trials, key=lambda trial: (trial.state != "finished", sign * (trial.value or 0.0))
    ):
        parameters = {name: trial.parameters[name] for name in sweep.axes}
        values = {
            name: f"{value:.4g}" if isinstance(value, float) else value
            for name, value in parameters.items()
        }
        result = None if trial.state == "failed" else trial.value
        rows[str(trial.number)] = {**vars(trial), "values": values, "result": result}
    columns = {
        "state": "{state}",
        **{name: f"{{values[{name}]}}" for name in sweep.axes},
        sweep.metric: "{result:.4f}",
    }
    columns |= {"steps": "{steps}", "time": "{seconds:.0f} s", "why": "{reason}"}
    goal = f"{sweep.metric}, {'lowest' if sweep.minimize else 'highest'} first"
    return Report(f"Sweep {sweep.name}: {sweep.method}, {goal}", rows, columns, "trial")


def draw(sweep: Sweep, trials: Sequence[Trial], path: Path) -> None:
    """Draw the metric over each parameter that varies, one panel each. Failed trials are marked at
    the upper edge."""
    varied = [
        name for name in sweep.axes if len({str(trial.parameters[name]) for trial in trials}) > 1
    ]
    shown = varied or list(sweep.axes)[:1]
    counts = [
        f"{n} {word}"
        for state, word in LABELS.items()
        if (n := sum(trial.state == state for trial in trials))
    ]
    with chart(path, 4.2, max(CHART_WIDTH, 3.4 * len(shown) + 0.8)) as figure:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, shown, strict=True):
            _slice(panel, sweep, trials, name)
        panels[0].set_ylabel(sweep.metric)
        heading(figure, f"Sweep {sweep.name}: {', '.join(counts) or 'no trial has ended'}")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)


def _slice(panel: Axes, sweep: Sweep, trials: Sequence[Trial], name: str) -> None:
    values = [trial.parameters[name] for trial in trials]
    numeric = all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    )
    categories = sorted({str(value) for value in values}) if not numeric else []
    floats = numeric and any(isinstance(value, float) for value in values)
    if floats and min(values) > 0 and max(values) / min(values) >= 20:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())

    def x(trial: Trial) -> float:
        value = trial.parameters[name]
        return float(value) if numeric else float(categories.index(str(value)))

    def dots(some: Sequence[Trial], color: str, label: str, **style: Any) -> None:
        if some:
            points = [x(t) for t in some], [t.history[-1] for t in some]
            panel.scatter(*points, color=TRIAL_COLORS[color], label=label, **style)

    judged = [t for t in trials if t.state == "finished" and t.history]
    dots(judged, "finished", "finished", s=42, marker="o", alpha=0.9)
    if len(trials) <= NUMBERED_TRIALS:
        for t in judged:
            point = (x(t), t.history[-1])
            _annotate(panel, str(t.number), point, (5, 5), color="#555555")
    if (first := best(sweep, trials)) is not None and first.value is not None:
        label = f"best: trial {first.number}, {first.value:.4g}"
        dots([first], "best", label, s=190, marker="*", edgecolors="black", linewidths=0.6)
    panel.margins(0.08, 0.15)
    low, high = panel.get_xlim() if judged and numeric else (-math.inf, math.inf)
    _mark_failed(panel, [x(t) for t in trials if t.state == "failed"], low, high)
    if judged and numeric:
        panel.set_xlim(low, high)
    if categories:
        letters = max(CATEGORY_LETTERS // len(categories), 5)
        panel.set_xticks(range(len(categories)), [fill(name, letters) for name in categories])
        panel.set_xlim(-0.5, len(categories) - 0.5)
    panel.set_xlabel(name)
    panel.grid(alpha=0.25)


def _mark_failed(panel: Axes, values: Sequence[float], low: float, high: float) -> None:
    """Mark failed trials at the upper edge. A value outside the axis is written beside its mark, so
    that the axis stays as wide as the others need."""
    edge = panel.get_xaxis_transform()  # y from 0 to 1
    for i, value in enumerate(values):
        inside = min(max(value, low), high)
        panel.scatter(
            [inside],
            [0.97],
            c=TRIAL_COLORS["failed"],
            transform=edge,
            s=48,
            marker="x",
            clip_on=False,
            label=None if i else "failed",
        )
        if inside != value:
            style = {"ha": "right", "va": "center", "color": TRIAL_COLORS["failed"]}
            _annotate(panel, f"{value:.3g} ", (inside, 0.97), (-6, 0), xycoords=edge, **style)


def _annotate(
    panel: Axes, text: str, point: tuple[float, float], offset: tuple[int, int], **style: Any
) -> None:
    panel.annotate(text, point, offset, textcoords="offset points", fontsize=SMALL, **style)
