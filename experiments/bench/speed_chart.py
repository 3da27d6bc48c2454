"""Charts of speed-ups over sequential top-2: a group of bars for each architecture, the paper's
values among them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.bench.row import Kind, Row, rows_of, table_cells
from experiments.bench.two_batches import stated_or_of_medians
from experiments.engine.bars import Bar, bar_legend, bars_height, grouped_bars
from scmoe.charts import BLUE, GREEN, LINES, PAPER, SKY, chart, heading
from scmoe.predict.row_names import PIPELINED, architecture_of, batches_of, name_of
from scmoe.report import Report

OTHER_WORK = ("top1", "top3", "scmoe2")  # rows of less or more computation than top-2
NTH = {1: "one", 2: "second one"}  # by Setting.every
KIND_WORDS: dict[Kind, str] = {"forward": "inference", "train": "training"}
OVER_TOP2 = "over top-2's best"  # heading of a column: the best of its rows in the report


class Printed(NamedTuple):
    """Speed-ups over top-2 that the paper prints for an iteration: {row: {kind: speed-up}}."""

    where: str
    rows: dict[str, dict[str, float]]


PAPERS = {  # by the share of communication that emulates the machine
    0.52: Printed(
        "paper, Table 1: an iteration of SwinV2-MoE-S, 8xA30-PCIe",
        {
            "top2": {"train": 1, "forward": 1},
            "top1": {"train": 1.27, "forward": 1.39},
            "shared_expert": {"train": 1.24, "forward": 1.35},
            "scmoe_pos1": {"train": 1.36, "forward": 1.54},
            "scmoe_pos2": {"train": 1.43, "forward": 1.66},
            "scmoe_pos3": {"train": 1.49, "forward": 1.82},
        },
    ),
    0.15: Printed(
        "paper, Table 2: an iteration of GPT2-MoE-Medium, 8xA800-NVLink",
        {
            "top2": {"train": 1, "forward": 1},
            "shared_expert": {"train": 1.04, "forward": 1.06},
            "scmoe_pos2": {"train": 1.12, "forward": 1.17},
        },
    ),
}


def printed_speedups(report: Mapping[str, Any]) -> Printed | None:
    """Return the paper's speed-ups on the machine that a report of `bench overlap` or of prefill
    emulates: they are of pairs, and of several sequences a rank."""
    is_usual = report.get("every", 2) == 2 and report.get("top_k", 1) == 1
    is_loopback = report.get("setting", {}).get("links") == "loopback"
    if is_loopback or has_one_sequence(report) or not is_usual:
        return None  # no rate was searched for the share, or the paper has no such blocks
    return PAPERS.get(report["wanted_share"])


def has_one_sequence(report: Mapping[str, Any]) -> bool:
    """Return whether a rank has one sequence in a batch, or one prompt in prefill. The first
    reports do not state their sequences: they had several."""
    if "prompt" in report:
        return report.get("texts", 1) == 1
    setting = report.get("setting", {})
    return "seq_len" in setting and setting["seq_len"] == setting["tokens"]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `bench overlap`: a panel for inference and one for training."""
    paper = printed_speedups(report)
    panels = {word: speed_bars(report, kind, paper) for kind, word in KIND_WORDS.items()}
    with chart(path, 2.3 + bars_height(panels["training"])) as figure:
        for axis, (word, groups) in zip(
            figure.subplots(1, 2, sharey=True), panels.items(), strict=True
        ):
            grouped_bars(axis, groups)
            axis.set(title=word, xlabel="speed-up over\nsequential top-2")
        share = f"{100 * report['comm_share']:.0f} % of top-2's inference is communication"
        heading(figure, f"{blocks_of(report)}, {conditions(report)}: {share}")
        colors = {"one chunk": BLUE}
        if any(row.endswith(PIPELINED) for row in report["rows"]):
            colors["pipelined (2 or 4 chunks)"] = SKY
        if any(batches_of(row) == 2 for row in report["rows"]):
            colors["two batches in flight"] = GREEN
        if paper:
            colors[paper.where] = PAPER
        quartiles = f"quartiles of {report['rounds']} rounds"
        bar_legend(figure, colors, quartiles, "limit: all communication hidden", ncols=1)


def blocks_of(report: Mapping[str, Any]) -> str:
    """Return what a report of `bench overlap` has measured."""
    is_iteration, top_k = report["level"] == "iteration", report.get("top_k", 1)
    if report.get("every", 2) == 1:
        what = (
            "One iteration of four blocks with an MoE each"
            if is_iteration
            else "Two blocks with an MoE each"
        )
    else:
        what = "One iteration of two pairs" if is_iteration else "One pair of blocks"
    usual = 4 if is_iteration else 2
    if report.get("layers", usual) != usual:
        blocks = f"{report['layers']} blocks, an MoE in every {NTH[report.get('every', 2)]}"
        what = f"One iteration of {blocks}" if is_iteration else blocks
    return what if top_k == 1 else f"{what}, {top_k} routed experts a token"


def tables(report: dict[str, Any]) -> list[Report]:
    where = conditions(report)  # a GPU's bus, or the loopback device as it is
    if report["link_mbit"] is not None:
        where = (
            f"Links of {report['link_mbit']:.0f} Mbit/s, {report['ranks']} ranks,"
            f" {report['compute']}"
            " compute"
        )
    title = (
        f"{where}, communication share {{comm_share:.3f}}, limit {{limit_forward:.2f}} forward and"
        " {limit_train:.2f} training, {rounds} rounds, {iterations} iterations:"
    )
    columns = {
        "forward": "{forward_speedup:.2f}",
        "training": "{train_speedup:.2f} [{train_quartiles[0]:.2f}, {train_quartiles[1]:.2f}]",
        "hidden forward, backward": "{overlap_forward:.0%}, {overlap_backward:.0%}",
        "slot x chunks": "{place} x {chunks}",
    }
    if report["level"] == "iteration":  # its limit has the gradients, which differ from row to row
        columns |= {
            "gradients, MiB": "{gradient_mb:.0f}",
            "limit": "{limit_train:.2f}",
            "of it": "{of_limit:.3f}",
        }
    columns["auto / best"] = "{auto_over_best:.3f}"
    columns[OVER_TOP2] = "{over_top2}"
    if any(batches_of(row) == 2 for row in report["rows"]):
        columns |= {"peak, MiB": "{peak_mb:.0f}", "over one batch's": "{peak_over_one_batch:.2f}"}
    if any("auto_of_both" in row for row in report["rows"].values()):
        columns["auto: batches, over best"] = (
            "{auto_of_both[batches_in_flight]}, {auto_of_both[over_best]:.3f}"
        )
    if report.get("every", 2) == 1:
        title = f"{blocks_of(report)}. {title}"
    return [Report(title.format_map(report), cells_with_gain(report), columns)]


def cells_with_gain(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a table shows of a report's rows, with their gain over top-2's best."""
    rows = rows_of(report)
    cells = table_cells(rows)
    gains = over_top2(rows)
    return {name: {**row, "over_top2": gains[name]} for name, row in cells.items()}


def over_top2(rows: Mapping[str, Row]) -> dict[str, str]:
    """Return what each row gains over the best of top-2's rows, forward and in training."""
    forward, train = (
        stated_or_of_medians(
            {name: stated_gain(row, kind) for name, row in rows.items()},
            {name: row.speedup(kind) for name, row in rows.items()},
        )
        for kind in KIND_WORDS
    )
    return {name: f"{forward[name]:.2f}, {train[name]:.2f}" for name in rows}


def stated_gain(row: Row, kind: Kind) -> float | None:
    """Return a row's gain over top-2's best as its report states it; None: it does not."""
    over = row.over_best_without_another_model
    return None if over is None else over[kind]["median"]


def speed_bars(report: dict[str, Any], kind: Kind, paper: Printed | None) -> dict[str, list[Bar]]:
    """Return the bars of each architecture: one chunk, pipelined, and the paper's."""
    groups: dict[str, list[Bar]] = {}
    for row, figures in rows_of(report).items():
        value = figures.speedup(kind)
        limit = limit_of(report, row, figures, kind)
        bar = Bar(value, color_of(row), f"{value:.2f}", figures.quartiles(kind), limit)
        groups.setdefault(name_of(row, report.get("every", 2)), []).append(bar)
    for row, values in paper.rows.items() if paper else ():
        if name_of(row) in groups:
            groups[name_of(row)].append(Bar(values[kind], PAPER, f"{values[kind]:.2f}"))
    return groups


def color_of(row: str) -> str:
    """Return the color of a row's bars."""
    if batches_of(row) == 2:
        return GREEN
    return SKY if row.endswith(PIPELINED) else BLUE


def line_colors(rows: Collection[str]) -> dict[str, str]:
    """Return the color of each row's line: one for each architecture."""
    bases = list(dict.fromkeys(map(architecture_of, rows)))
    return {row: LINES[bases.index(architecture_of(row)) % len(LINES)] for row in rows}


def limit_of(report: dict[str, Any], row: str, figures: Row, kind: Kind) -> float | None:
    """Return the speed-up of top-2 without its communication; None for a row of other work."""
    is_usual = architecture_of(row) == "top2" or report.get("top_k", 1) == 1
    if architecture_of(row) in OTHER_WORK or not is_usual:
        return None
    if kind == "forward":
        return report["limit_forward"]
    # an iteration's rows have gradients of their own
    return report["limit_train"] if figures.limit_train is None else figures.limit_train


def conditions(report: dict[str, Any], *others: dict[str, Any]) -> str:
    """Return where reports of `bench overlap` were measured, which differ in the rate of their
    links only."""
    rates = ", ".join(f"{each['link_mbit'] or 0:.0f}" for each in (report, *others))
    links = {
        "shaped": f"links of {rates} Mbit/s between {report['ranks']} ranks on one CPU",
        "loopback": f"loopback as it is between {report['ranks']} ranks on one CPU",
        "bus": (
            f"rows over the bus of a {report['device']} at {report.get('bus_rate', 1.0):.2g} times"
            " its rate"
        ),
    }
    return f"{report['compute']} compute, {links[next(iter(rows_of(report).values())).links]}"
