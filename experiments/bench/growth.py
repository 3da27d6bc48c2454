"""How the time of a pair of blocks, and what overlap saves of it, grow with tokens, ranks and
experts.

    tokens    per rank, twice and four times as many; emulated compute, links as at the first point
    ranks     2, 4, 8 with as many tokens each; emulated compute, links for the same communication
              share at each
    experts   8, 32, 128 for the same tokens; real compute, links as at the first point

Each point is measured as by `bench overlap`. Points are measured one after another, so compare
their ratios: times of a shared machine drift between them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench.loads import BALANCED
from experiments.bench.overlap import measure
from experiments.bench.overlap_report import summary, why_uneven
from experiments.bench.pairs import Setting
from experiments.engine.ranks import run_ranks
from scmoe.config.extras import require
from scmoe.config.leaves import ConfigError
from scmoe.probes.charts import BLUE, GREEN, ORANGE, SKY, chart, heading, title
from scmoe.report import Report, publish, write_json

POINTS = {"tokens": (512, 1024, 2048), "ranks": (2, 4, 8), "experts": (8, 32, 128)}
SHOWN = {  # name, colour and marker of each row beside top-2
    "shared_expert": ("Shared-expert", GREEN, "s"),
    "scmoe_pos2": ("ScMoE (Pos-2)", BLUE, "o"),
    "scmoe_pos2_pipelined": ("ScMoE (Pos-2), pipelined", SKY, "D"),
}
ROWS = ("top2", *SHOWN)


def bench_growth(
    of: Sequence[str], points: Sequence[int] | None, rounds: int, out: Path
) -> dict[str, Any]:
    """Measure every point, print tables, and write chart and figures into `out`. Returns the
    reports by what grows.

    of: keys of POINTS. points: values for a single key. The caller has entered a network namespace
    (links.py).
    """
    require("bench growth", "matplotlib")
    report: dict[str, list[dict[str, Any]]] = {name: [] for name in of}
    so_far = out / "growth.json.part"  # if a later point fails, the earlier ones stay there
    for name, found in report.items():
        for value in points or POINTS[name]:
            print(f"{name}: {value}", file=sys.stderr)
            setting, ranks = at(name, value, found[0]["link_mbit"] if found else None, rounds)
            result = run_ranks(measure, ranks, setting, timeout_s=1800, own_links=True)[0][BALANCED]
            found.append({**summary(setting, ranks, result), name: value})
            write_json(so_far, report)
    publish(report, tables(report), draw, out / "growth")
    so_far.unlink()
    return report


def check(of: str, points: Sequence[int]) -> None:
    """Raise ConfigError for a point that cannot be measured."""
    for value in points:
        setting, ranks = at(of, value, None, 2)
        if value < 1 or ranks < 2:
            raise ConfigError(f"--points has {value}, allowed: {2 if of == 'ranks' else 1} or more")
        if uneven := why_uneven(setting, ranks):
            raise ConfigError(f"--points has {value}: {uneven}")


def at(of: str, value: int, link_mbit: float | None, rounds: int) -> tuple[Setting, int]:
    """Return a point's setting and number of ranks. link_mbit: that of the first point; None: this
    is the first."""
    if of == "tokens":
        attention_ms = 45.0 * value / 1024
        return (
            Setting(
                0.52, link_mbit, rounds=rounds, tokens=value, attention_ms=attention_ms, rows=ROWS
            ),
            2,
        )
    if of == "ranks":  # longer operators: 8 ranks share the processors that carry their transfers
        return Setting(0.35, rounds=rounds, attention_ms=90.0, rows=ROWS), value
    return Setting(0.52, link_mbit, compute="real", rounds=rounds, num_experts=value, rows=ROWS), 2


def tables(report: dict[str, list[dict[str, Any]]]) -> list[Report]:
    both = "{{rows[{0}][forward_speedup]:.2f}}, {{rows[{0}][train_speedup]:.2f}}".format
    columns = {
        "ranks": "{ranks}",
        "Mbit/s": "{link_mbit:.0f}",
        "share": "{comm_share:.2f}",
        "limit": "{limit_forward:.2f}, {limit_train:.2f}",
        "top-2, ms": "{rows[top2][forward_ms]:.0f}, {rows[top2][train_ms]:.0f}",
        **{row: both(row) for row in SHOWN},
        "peak, MiB": "{rows[scmoe_pos2][peak_mb]:.0f}, {rows[scmoe_pos2_pipelined][peak_mb]:.0f}",
    }
    words = (
        "Two values are forward, training; of the peak, `scmoe_pos2` and `scmoe_pos2_pipelined`."
    )
    found = []
    for of, points in report.items():
        rows = {f"{point[of]} {of}": point for point in points}
        found.append(
            Report(f"{points[0]['compute'].capitalize()} compute. {words}", rows, columns, "point")
        )
    return found


def draw(report: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw a panel for each thing that grows: speed-ups of training over top-2 at the same point,
    and the limit."""
    with chart(path, 0.9 + 2.3 * len(report)) as figure:
        axes = figure.subplots(len(report), 1, squeeze=False)[:, 0]
        for axis, (of, points) in zip(axes, report.items(), strict=True):
            places = range(len(points))
            limits = [p["limit_train"] for p in points]
            axis.plot(
                places,
                limits,
                color=ORANGE,
                linewidth=2.5,
                label="limit: all of top-2's communication hidden",
            )
            for i, (name, (word, color, marker)) in enumerate(SHOWN.items()):
                rows = [p["rows"][name] for p in points]
                shifted = [place + 0.05 * (i - 1) for place in places]  # whiskers lie side by side
                axis.plot(
                    shifted,
                    [row["train_speedup"] for row in rows],
                    marker,
                    ls="-",
                    color=color,
                    label=word,
                )
                axis.vlines(
                    shifted,
                    *zip(*(row["train_quartiles"] for row in rows), strict=True),
                    color=color,
                )
            axis.set_xticks(places, [str(p[of]) for p in points])
            axis.margins(0.12)
            axis.grid(axis="y")
            axis.set(
                xlabel="tokens of a rank" if of == "tokens" else of, ylabel="speed-up of training"
            )
            title(axis, f"{of}, {points[0]['compute']} compute", 60)
        rounds = next(iter(report.values()))[0]["rounds"]
        heading(
            figure,
            f"A pair of blocks against sequential top-2; vertical lines: quartiles of {rounds}"
            " rounds",
        )
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=1)
