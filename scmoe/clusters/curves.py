"""Curves of a shortcut's speed-up over one property of a cluster or a job.

A line is drawn where the profile was measured. Beyond it there is a band alone, from the 5th to the
95th percentile, with a thin line for the profile's own values: extrapolation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

from scmoe.clusters.advise import SEED, SHARED, Job, Model, Plan, interval
from scmoe.clusters.profile import Profile
from scmoe.probes.charts import BLUE, GREEN, ORANGE, chart, heading

SAMPLES = 16  # machines of a point


class Point(NamedTuple):
    """Speed-ups at one value of x: by rival, at the profile's values and their interval."""

    x: float
    over: Mapping[str, tuple[float, tuple[float, float]]]


@dataclass(frozen=True)
class Curve:
    """name: of the file. what: beside the axis. measured: between which x the profile was measured;
    None: nowhere."""

    name: str
    what: str
    points: Sequence[Point]
    measured: tuple[float, float] | None = None
    logarithmic: bool = True


def point(x: float, models: Sequence[Model], profile: Profile, job: Job, shortcut: str) -> Point:
    """Return the speed-ups of a shortcut's best row over its rivals. models: the standard first."""
    plan = Plan(models, profile, job, models[0].name)
    random = Random(SEED)
    drawn = [plan.drawn(random) for _ in range(SAMPLES)]
    nominal = plan.totals(profile.machine(), job)
    rows = [row for row, model in plan.model_of.items() if model.name == shortcut]
    standard = models[0].name
    rivals = {
        f"over sequential {standard}": [standard],
        f"over {standard} at its best": plan.of_standard(),
        f"over {SHARED} at its best": plan.of_shared(),
    }

    def over(totals: Mapping[str, float], names: Sequence[str]) -> float:
        return min(totals[name] for name in names) / min(totals[row] for row in rows)

    speed_ups = {}
    for rival, names in rivals.items():
        if names:
            own_values = over(nominal, names)
            band = interval([over(totals, names) for totals in drawn], own_values)
            speed_ups[rival] = own_values, band
    return Point(x, speed_ups)


def draw(curve: Curve, words: str, path: Path) -> None:
    """Draw a curve. words: the conditions."""
    with chart(path, 4.2) as figure:
        axis = figure.subplots()
        xs = [each.x for each in curve.points]
        for color, rival in zip((BLUE, GREEN, ORANGE), curve.points[0].over, strict=False):
            nominal = [each.over[rival][0] for each in curve.points]
            low, high = zip(*(each.over[rival][1] for each in curve.points), strict=True)
            axis.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
            axis.plot(xs, nominal, "--", color=color, linewidth=0.8, label=rival)
            inside = [
                (x, y)
                for x, y in zip(xs, nominal, strict=True)
                if curve.measured and curve.measured[0] <= x <= curve.measured[1]
            ]
            if inside:
                axis.plot(*zip(*inside, strict=True), "-o", color=color)
        axis.axhline(1.0, color="#888888", linewidth=0.8)
        if curve.logarithmic:
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs, [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in xs])
        axis.set(xlabel=curve.what, ylabel="speed-up of a training step")
        axis.grid(axis="y")
        figure.legend(loc="outside lower left")
        where = "extrapolation: nothing of this cluster is measured"
        if curve.measured is not None:
            where = "dots are where the cluster was measured, bands are extrapolation"
        heading(figure, f"{words}\nPrediction; {where}")
