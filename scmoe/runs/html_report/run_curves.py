"""Losses of runs over tokens and over seconds, and the load of each expert by layer over time."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from scmoe.files import warn_once
from scmoe.runs.html_report.svg import LINE, SERIES, drawing
from scmoe.runs.seen import SeenRun

POINTS = 300  # of a curve; more are averaged in groups
COLUMNS = 160  # of a heat map; more logged steps are summed in groups
DASHES = ("", "6 3", "2 2")  # of the second and third six runs
LOSSES = {"train/loss": "Training loss", "val/loss": "Validation loss"}
MOST = 2.0  # load at which the colours end
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """The label and the style of a curve, equal in every drawing of its group. number: from 0."""

    label: str
    number: int

    @property
    def color(self) -> str:
        return SERIES[self.number % len(SERIES)]

    @property
    def css(self) -> str:
        """Return the variable of the style sheet that holds the colour."""
        return f"c{self.number % len(SERIES) + 1}"

    @property
    def dashes(self) -> str:
        return DASHES[self.number // len(SERIES) % len(DASHES)]


def seconds_of(run: SeenRun) -> dict[float, float]:
    """Return the seconds of training until each logged amount of tokens (images).

    They are sums of tokens over logged speeds: without validation and checkpoints, and right across
    the parts of a resumed run. A run that has logged no speed has none.
    """
    speeds = run.curve(f"time/{run.counts}_per_s")
    seconds = {0.0: 0.0}
    elapsed, before = 0.0, 0.0
    for tokens, per_s in speeds:
        if per_s > 0:
            elapsed += (tokens - before) / per_s
            before = tokens
            seconds[tokens] = elapsed
    return seconds if len(seconds) > 1 else {}


def over_seconds(run: SeenRun, metric: str) -> Points:
    """Return points (seconds of training, value). Between logged speeds seconds are interpolated,
    after the last one they go on at its speed."""
    import numpy as np

    known = seconds_of(run)
    points = run.curve(metric)
    if not known or not points:
        return []
    tokens, values = np.array(points).T
    amounts, seconds = np.array([*known]), np.array([*known.values()])
    at_speed = (seconds[-1] - seconds[-2]) / (amounts[-1] - amounts[-2])
    beyond = np.maximum(tokens - amounts[-1], 0) * at_speed
    elapsed = np.interp(tokens, amounts, seconds) + beyond
    return [*zip(elapsed.tolist(), values.tolist(), strict=True)]


def thinned(points: Points) -> Points:
    """Return at most POINTS points, each the mean of as many neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def loss_drawings(runs: Sequence[SeenRun], lines: Sequence[Line]) -> list[tuple[str, Markup]]:
    """Return caption and drawing of each loss over tokens and over seconds, as far as logged."""
    unit = " or ".join(sorted({run.counts for run in runs}))
    drawings = []
    for metric, name in LOSSES.items():
        curves = {
            unit: [run.curve(metric) for run in runs],
            "seconds of training": [over_seconds(run, metric) for run in runs],
        }
        for x, points in curves.items():
            if any(points):
                caption = f"{name} over {x}"
                drawings.append((caption, draw_losses(lines, points, x, caption)))
    return drawings


def draw_losses(lines: Sequence[Line], curves: Sequence[Points], x: str, words: str) -> Markup:
    """Draw a curve for each line. x: label of its axis. words: what the drawing shows."""
    from matplotlib.ticker import EngFormatter

    with drawing(words, 2.5) as drawn:
        axis = drawn.figure.subplots()
        for line, points in zip(lines, map(thinned, curves), strict=True):
            if not points:
                continue
            dots = {"marker": "o", "markersize": 3.5} if len(points) < 30 else {}
            (curve,) = axis.plot(
                *zip(*points, strict=True), color=line.color, linewidth=1.6, **dots
            )
            if line.dashes:
                curve.set_dashes([float(length) for length in line.dashes.split()])
            curve.set_gid(drawn.tip(f"{line.label}: last {points[-1][1]:.4g}"))
        axis.set(xlabel=x, ylabel="nats", xlim=(0, None))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid()
    return drawn.svg


@dataclass(frozen=True)
class Loads:
    """The copies of each expert since the last log.

    steps: of the logs. copies: by layer, of each log, of each expert.
    """

    steps: list[int]
    copies: dict[int, list[list[int]]]


def read_loads(table: Path) -> Loads | None:
    """Return what the callback ExpertLoad has kept in analysis/expert_load.csv; None: nothing.

    A step whose rows are not whole, as a crash leaves them, is left out. A file that is no text is
    left out, and a line on standard error names it.
    """
    if not table.exists():
        return None
    by_step: dict[int, dict[int, list[int]]] = {}
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows_of_texts = [*csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        warn_once(f"{table} is left out, as it cannot be read: {error}")
        return None
    for row in rows_of_texts:
        counts = [value for key, value in row.items() if str(key).startswith("expert_")]
        numbers = [row.get("step"), row.get("layer"), *counts]
        if row.get("dropped") and counts and all(text and text.isdecimal() for text in numbers):
            layer = by_step.setdefault(int(row["step"]), {})
            layer[int(row["layer"])] = [int(count) for count in counts]
    layers = sorted({layer for step in by_step.values() for layer in step})
    steps = [step for step, rows in by_step.items() if len(rows) == len(layers)]
    if not steps:
        return None
    return Loads(steps, {layer: [by_step[step][layer] for step in steps] for layer in layers})


def grouped(loads: Loads) -> Loads:
    """Return at most COLUMNS steps: copies of neighbours are added, the step is the last one."""
    size = -(-len(loads.steps) // COLUMNS)
    starts = range(0, len(loads.steps), size)
    copies = {
        layer: [[sum(column) for column in zip(*rows[i : i + size], strict=True)] for i in starts]
        for layer, rows in loads.copies.items()
    }
    return Loads([loads.steps[i : i + size][-1] for i in starts], copies)


def load_drawings(loads: Loads) -> list[tuple[str, Markup]]:
    """Return captions and heat maps of load over the fair share: the busiest expert of each MoE
    layer over time, then all experts of each layer over time."""
    loads = grouped(loads)
    shares = {
        layer: [[count * len(row) / max(sum(row), 1) for count in row] for row in rows]
        for layer, rows in loads.copies.items()
    }
    busiest = [[max(row) for row in rows] for rows in zip(*shares.values(), strict=True)]
    caption = "The busiest expert of each MoE layer"
    drawings = [(caption, draw_loads(loads.steps, busiest, caption, "MoE layer"))]
    for layer, rows in shares.items():
        last = max(rows[-1])
        caption = (
            f"MoE layer {layer}: busiest expert {max(map(max, rows)):.2f} x the fair share at most,"
            f" at the end {last:.2f} (expert {rows[-1].index(last)})"
        )
        drawings.append((caption, draw_loads(loads.steps, rows, caption, "expert")))
    return drawings


def draw_loads(
    steps: Sequence[int], shares: Sequence[Sequence[float]], words: str, rows: str
) -> Markup:
    """Draw a heat map, x: logged steps, y: experts or layers, which `rows` names.

    The fair share has nearly the colour of the page.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    pixels = np.array(shares).T
    maps = {  # blue and vermillion of Okabe and Ito, for colour-blind readers
        "only-light": ("#0072b2", "#f4f4f2", "#c43c00"),
        "only-dark": ("#4db4f5", "#262b33", "#ff7a3d"),
    }
    with drawing(words, min(0.9 + 0.13 * len(shares[0]), 3.4)) as drawn:
        axis = drawn.figure.subplots()
        for gid, colors in maps.items():
            image = axis.imshow(
                pixels,
                cmap=LinearSegmentedColormap.from_list(gid, colors),
                vmin=0,
                vmax=MOST,
                aspect="auto",
                interpolation="none",
                extent=(-0.5, len(steps) - 0.5, len(pixels) - 0.5, -0.5),
            )
            image.set_gid(gid)
        ticks = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).astype(int))
        axis.set_xticks(ticks, [f"{steps[tick] + 1:,}" for tick in ticks])
        axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set(xlabel="training steps", ylabel=rows)
        for side in axis.spines.values():
            side.set_visible(False)
        axis.tick_params(length=2, color=LINE)
    return drawn.svg
