"""Curves of a shortcut's speed-up over one property of a cluster or a job.

The band is from the 5th to the 95th percentile, the dashed line is for the profile's own values. A
dot stands where the transfers of rows are within what was measured: even exchanges on the same link
between the same ranks, of sizes between the smallest and the largest one that was measured. All
else is extrapolation. Computing and gradients do not decide where a dot stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

from scmoe.charts import BLUE, GREEN, ORANGE, chart, heading
from scmoe.predict.advise import SEED, interval, tier_of
from scmoe.predict.plan import CHUNKS, SHARED, Job, Model, Plan
from scmoe.predict.profile import Profile

SAMPLES = 16  # machines of a point


class Point(NamedTuple):
    """Speed-ups at one value of x: by rival, at the profile's values and their interval.

    is_measured: whether its transfers are within what was measured.
    """

    x: float
    over: Mapping[str, tuple[float, tuple[float, float]]]
    is_measured: bool = False


@dataclass(frozen=True)
class Curve:
    """name: of the file. what: beside the axis."""

    name: str
    what: str
    points: Sequence[Point]
    logarithmic: bool = True


def point(x: float, models: Sequence[Model], profile: Profile, job: Job, shortcut: str) -> Point:
    """Return the speed-ups of a shortcut's best row over its rivals. models: the standard first."""
    plan = Plan(models, profile, job, models[0].name)
    random = Random(SEED)
    drawn = [plan.drawn(random) for _ in range(SAMPLES)]
    nominal = plan.totals(profile.machine(), job)
    rows = plan.at_best(shortcut)
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
    return Point(x, speed_ups, is_measured(models, profile, job))


def is_measured(models: Sequence[Model], profile: Profile, job: Job) -> bool:
    """Return whether the models' rows travel as exchanges that were measured, in one piece and in
    the most chunks."""
    if profile.measured_bytes is None:
        return False
    smallest, largest = profile.measured_bytes
    whole = [nbytes for model in models for nbytes in transfers(model, job)]
    has_sizes = smallest <= min(whole) / max(CHUNKS) and max(whole) <= largest
    is_even = all(model.loads is None for model in models)
    has_ranks = job.sizes.ep_size == profile.ranks
    tier = tier_of(models[0], profile.machine(), job.sizes)
    return has_sizes and is_even and has_ranks and link_is_measured(profile, tier)


def link_is_measured(profile: Profile, tier: str) -> bool:
    """Return whether an exchange takes as long on a link as was measured. That a measured rate
    attains all of itself is true by definition, and its latency includes every peer."""
    rate, attained, latency = (
        profile.values[f"links.{tier}.{key}"] for key in ("gb_s", "attained", "latency_us")
    )
    attains_all = attained == (1.0, "given") or attained.source == "measured"
    adds_nothing = profile.values["peer_us"].value == 0
    return rate.source == latency.source == "measured" and attains_all and adds_nothing


def transfers(model: Model, job: Job) -> list[float]:
    """Return the bytes of a rank in a transfer of each block, in one piece."""
    rows = job.sizes.rows * job.sizes.sent
    return [
        rows * sum(part.rows_bytes for part in layer.after if part.operator == "dispatch")
        for layer in model.costs.layers
    ]


def basis(points: Sequence[Point], profile: Profile) -> str:
    """Return what the dots of a curve mean, or why it has none."""
    if any(each.is_measured for each in points):
        return "dots: exchanges of such sizes were measured; the rest is extrapolation"
    why = "no such exchange was measured"
    if all(value.source != "measured" for value in profile.values.values()):
        why = "nothing of this cluster is measured"
    elif profile.measured_bytes is None:
        why = "no exchange of a known size was measured"
    return f"extrapolation: {why}"


def draw(curve: Curve, words: str, path: Path) -> None:
    """Draw a curve. words: the heading."""
    with chart(path, 4.2) as figure:
        axis = figure.subplots()
        xs = [each.x for each in curve.points]
        for color, rival in zip((BLUE, GREEN, ORANGE), curve.points[0].over, strict=False):
            nominal = [each.over[rival][0] for each in curve.points]
            low, high = zip(*(each.over[rival][1] for each in curve.points), strict=True)
            axis.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
            axis.plot(xs, nominal, "--", color=color, linewidth=0.8, label=rival)
            inside = [
                (each.x, y)
                for each, y in zip(curve.points, nominal, strict=True)
                if each.is_measured
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
        heading(figure, words)
