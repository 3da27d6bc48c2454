"""What uneven routing costs: the part of a report of `bench overlap --load` that compares a load
with the balanced one.

    over balanced   time of a row at its best schedule, over its time at the balanced load and the
                    schedule that is best there, in the same round
    straggler       what of it is computation of the busiest rank: T_free(load) / T_free(balanced) -
                    1
    model           T_free(balanced) and what the timeline of all ranks (schedule/cost.py) adds to
                    it, from the times of the operators at the balanced load and the rows of each
                    rank. There is none where rows are dropped, where ranks have different numbers
                    of tokens, or where they share a node's card

Speed-ups are over sequential top-2 at the same load, and hidden shares have T_sequential and T_free
at the same load.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.loads import BALANCED, Load, Place, counts_of, load_of
from experiments.bench.overlap import Measured, way_of
from experiments.bench.pairs import Setting
from experiments.bench.speed_chart import name_of, ranks_of, way_of_row, with_places
from experiments.bench.stacks import windows_of
from experiments.bench.two_batches import PIPELINED, architecture_of, batches_of
from experiments.engine.clock import middle, quartiles
from scmoe.probes.charts import chart, heading
from scmoe.report import Report
from scmoe.schedule.cost import (
    OperatorTimes,
    elapsed,
    elapsed_time,
    exposed_time,
    per_chunk,
    play_ranks,
    shares,
)
from scmoe.schedule.schedule import Schedule

APART = 0.006  # between rows at the same load, so that their quartiles do not cover each other
KEPT = (  # of the balanced
    *("overlap_forward", "overlap_backward", "forward_speedup", "train_speedup"),
    *("slot", "inside_attention", "chunks"),
)


def beside_balanced(
    setting: Setting,
    ranks: int,
    found: Measured,
    control: Measured,
    row: str,
    balanced: dict[str, Any],
) -> dict[str, Any]:
    """Return the figures of a row at a load beside the balanced one. balanced: its figures there."""
    block, here, there = setting.block_of(row), found.rows[row], control.rows[row]
    own, even = found.times[here.best], found.times[there.best]
    load, modelled = load_of(found.load), None
    one = here.best.batches_in_flight == 1  # uneven halves are not played
    even_numbers = load.kind != "ragged" and setting.layout in (None, "dropless")
    if one and even_numbers and setting.nodes == 1:
        place = Place(setting.num_experts, setting.top_k_of(block), ranks)
        windows = windows_of(here.best, there.choices)
        computing = sum(elapsed_time(*each) - exposed_time(*each) for each in windows)
        took = [
            sum(window_s(*w, load, place, setting.tokens, step) for w in windows)
            for step in range(setting.rounds)
        ]
        added = setting.accumulate * (middle(took) - computing)
        modelled = middle(way_of(found, block, "free", BALANCED).train) + added
    free, even_free = (way_of(found, block, "free", load) for load in (found.load, BALANCED))
    return {
        "over_balanced_forward": middle(own.forward / even.forward),
        "over_balanced_train": middle(own.train / even.train),
        "over_balanced_quartiles": quartiles(own.train / even.train),
        "straggler_forward": middle(free.forward / even_free.forward) - 1,
        "straggler_train": middle(free.train / even_free.train) - 1,
        "measured_over_model": None if modelled is None else middle(own.train) / modelled,
        "dropped": here.dropped,
        "balanced": {key: balanced[key] for key in KEPT},
    }


def window_s(
    schedule: Schedule, times: OperatorTimes, load: Load, place: Place, tokens: int, step: int
) -> float:
    """Return the modelled seconds from the tap to the end of the block and back, in one step of a
    load.

    times: of the operators at the balanced load. tokens: of each rank."""
    counts_PRE = counts_of(
        load, place, [tokens] * place.ranks, load.phase(step, place.ranks), schedule.chunks
    )
    rows_PRR = counts_PRE.unflatten(2, (place.ranks, -1)).sum(3).tolist()
    own = [shares(rows_RR) for rows_RR in rows_PRR]
    forward = play_ranks(schedule.operators(), per_chunk(schedule, times.forward), own)
    starts = [spans[-1].end for spans in forward]
    operators = schedule.backward_operators()
    return max(
        map(elapsed, play_ranks(operators, per_chunk(schedule, times.backward), own, starts=starts))
    )


def tables(report: dict[str, Any]) -> list[Report]:
    columns = {
        "rank, expert": "{max_over_mean_ranks:.2f}, {max_over_mean_experts:.2f}",
        "over balanced": "{over_balanced_forward:.2f}, {over_balanced_train:.2f}",
        "straggler": "{straggler_forward:.0%}, {straggler_train:.0%}",
        "over top-2": "{forward_speedup:.2f}, {train_speedup:.2f}",
        "hidden": "{overlap_forward:.0%}, {overlap_backward:.0%}",
        "at balance": "{balanced[overlap_forward]:.0%}, {balanced[overlap_backward]:.0%}",
        "slot x chunks": "{place} x {chunks}",
        "auto / best": "{auto_over_best:.3f}",
        "/ model": "{measured_over_model:.3f}",
    }
    of_layout = {"dropped": "{dropped:.1%}", "peak, MiB": "{peak_mb:.0f}"}
    return [
        Report(
            words_of(own),
            with_places(own["rows"]),
            columns if own["layout"] == "dropless" else columns | of_layout,
        )
        for own in report["loads"]
    ]


def words_of(report: dict[str, Any]) -> str:
    """Return the conditions of a load's report."""
    load = report["load"]
    machine = (
        f"{report['compute']} compute, {ranks_of(report)}, {report['level']}, {report['layout']}"
    )
    words = (
        f"{load['name']}: the busiest rank has {load['max_over_mean_ranks']:.2f} times the mean,"
        f" the busiest expert {load['max_over_mean_experts']:.2f} times; {machine},"
        f" {report['rounds']} rounds, communication share {report['balanced_share']:.2f} at"
        f" balance, {report['comm_share']:.2f} here"
    )
    return f"{words}. First values are forward, second ones training, of `hidden` backward:"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the time of a training step over the balanced one."""
    first = report["loads"][0]
    of = "A pair" if first["level"] == "block" else "An iteration"
    words = (
        f"{of}, {first['compute']} compute, {ranks_of(first)}, share {first['balanced_share']:.2f}"
    )
    draw_lines(
        report["loads"], "over_balanced_train", path, words, "training step over its balanced one"
    )


def draw_lines(
    reports: Sequence[Mapping[str, Any]], over: str, path: Path, words: str, what: str
) -> None:
    """Draw a time over its balanced one against the load of the busiest rank, a line for each row.
    reports: of each load. over: the key of that ratio in a row; its quartiles are
    `over_balanced_quartiles`."""
    reports = sorted(reports, key=lambda own: own["load"]["max_over_mean_ranks"])
    rows = reports[0]["rows"]
    bases = list(dict.fromkeys(map(architecture_of, rows)))
    with chart(path, 3.9 + 0.12 * len(rows)) as figure:
        axis = figure.subplots()
        for i, row in enumerate(rows):
            color = f"C{bases.index(architecture_of(row))}"
            line = {(1, False): "-o", (1, True): "--o", (2, False): "-.s", (2, True): ":s"}[
                batches_of(row), row.endswith(PIPELINED)
            ]
            label = name_of(row, reports[0].get("every", 2)) + way_of_row(row)
            points = [own["rows"][row] for own in reports]
            at = [own["max_over_mean_ranks"] + APART * i for own in points]
            axis.plot(
                [1.0, *at], [1.0, *(own[over] for own in points)], line, color=color, label=label
            )
            quartiles = zip(*(own["over_balanced_quartiles"] for own in points), strict=True)
            axis.vlines(at, *quartiles, color=color)
        axis.set(xlabel="rows of the busiest rank over the mean", ylabel=what)
        axis.grid(axis="y")
        figure.legend(loc="outside lower left", ncols=2)
        heading(figure, words)
