"""Charts of speed-ups over sequential top-2: a group of bars for each architecture, the paper's values among them."""

from pathlib import Path
from typing import Any, NamedTuple

from scmoe.experiments.engine.bars import Bar, bar_legend, grouped_bars, height_of
from scmoe.probes.charts import BLUE, PAPER, SKY, chart, heading

NAMES = {
    "top2": "Standard top-2",
    "top1": "Standard top-1",
    "top3": "Standard top-3",
    "shared_expert": "Shared-expert",
    "scmoe2": "ScMoE-2",
    **{f"scmoe_pos{i}": f"ScMoE (Pos-{i})" for i in (1, 2, 3)},
}
OTHER_WORK = ("top1", "top3", "scmoe2")  # rows of less or more computation than top-2
KINDS = {"forward": "inference", "train": "training"}
PIPELINED = "_pipelined"


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


def name_of(row: str) -> str:
    """Return the paper's name of a row's architecture, such as `ScMoE (Pos-2)` for scmoe_pos2_pipelined."""
    return NAMES[row.removesuffix(PIPELINED)]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `bench overlap`: a panel for inference and one for training."""
    paper = PAPERS.get(report["wanted_share"])
    panels = {word: speed_bars(report, kind, paper) for kind, word in KINDS.items()}
    with chart(path, 2.3 + height_of(panels["training"])) as figure:
        for axis, (word, groups) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            grouped_bars(axis, groups)
            axis.set(title=word, xlabel="speed-up over\nsequential top-2")
        what = "pair of blocks" if report["level"] == "block" else "iteration of two pairs"
        share = f"{100 * report['comm_share']:.0f} % of top-2's inference is communication"
        heading(figure, f"One {what}, {conditions(report)}: {share}")
        colors = {"one chunk": BLUE}
        if any(row.endswith(PIPELINED) for row in report["rows"]):
            colors["pipelined (2 or 4 chunks)"] = SKY
        if paper:
            colors[paper.where] = PAPER
        quartiles = f"quartiles of {report['rounds']} rounds"
        bar_legend(figure, colors, quartiles, "limit: all communication hidden", ncols=1)


def speed_bars(report: dict[str, Any], kind: str, paper: Printed | None) -> dict[str, list[Bar]]:
    """Return the bars of each architecture: one chunk, pipelined, and the paper's."""
    groups: dict[str, list[Bar]] = {}
    for row, own in report["rows"].items():
        value, color = own[f"{kind}_speedup"], SKY if row.endswith(PIPELINED) else BLUE
        bar = Bar(value, color, f"{value:.2f}", own[f"{kind}_quartiles"], limit_of(report, row, kind))
        groups.setdefault(name_of(row), []).append(bar)
    for row, values in paper.rows.items() if paper else ():
        if name_of(row) in groups:
            groups[name_of(row)].append(Bar(values[kind], PAPER, f"{values[kind]:.2f}"))
    return groups


def limit_of(report: dict[str, Any], row: str, kind: str) -> float | None:
    """Return the speed-up of top-2 without its communication; None for a row of other work."""
    if row.removesuffix(PIPELINED) in OTHER_WORK:
        return None
    # an iteration's rows have gradients of their own
    return report["rows"][row].get(f"limit_{kind}", report[f"limit_{kind}"])


def ranks_of(report: dict[str, Any]) -> str:
    """Return the report's ranks in words."""
    on_nodes = f" on {report['nodes']} nodes ({report['exchange']} exchange)" if "nodes" in report else ""
    return f"{report['ranks']} ranks{on_nodes}"


def conditions(report: dict[str, Any], *others: dict[str, Any]) -> str:
    """Return where reports of `bench overlap` were measured, which differ in the rate of their links only."""
    rates = ", ".join(f"{each['link_mbit'] or 0:.0f}" for each in (report, *others))
    links = {
        "shaped": f"links of {rates} Mbit/s between {ranks_of(report)} on one CPU",
        "loopback": f"loopback as it is between {ranks_of(report)} on one CPU",
        "bus": f"rows over the bus of a {report['device']} at {report.get('bus_rate', 1.0):.2g} times its rate",
    }
    return f"{report['compute']} compute, {links[next(iter(report['rows'].values()))['links']]}"
