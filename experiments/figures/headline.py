"""The README's first picture: what ScMoE gains on this testbed in training and in inference, beside the paper's."""

from pathlib import Path
from typing import Any

from scmoe.experiments.bench.speed_chart import PAPERS, PIPELINED, name_of
from scmoe.probes.charts import BLUE, PAPER, Bar, bar_legend, chart, grouped_bars, heading

SHARE = 0.52
REPORTS = {"training": f"overlap-real-block-2-ranks-share-{SHARE}", "inference": f"inference-2-ranks-share-{SHARE}"}
ROWS = ("top2", "shared_expert", "scmoe_pos1", "scmoe_pos2", "scmoe_pos3")


def draw_headline(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a panel for each report: each row in the faster of one chunk and several (training), or as planned.

    reports: by the keys of REPORTS.
    """
    panels = {word: [OURS[word](report, row) for row in ROWS] for word, report in reports.items()}
    names = {row: name_of(row) for row in ROWS}
    if all(pipelined for (_, pipelined), *_ in panels.values()):  # beside the paper's top-2, which waits
        names["top2"] += ",\nours pipelined"
    with chart(path, 4.5) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (word, bars) in zip(axes, panels.items(), strict=True):
            papers = [PAPERS[SHARE].rows[row]["train" if word == "training" else "forward"] for row in ROWS]
            groups = {
                names[row]: [bar, Bar(paper, PAPER, f"{paper:.2f}")]
                for row, (bar, _), paper in zip(ROWS, bars, papers, strict=True)
            }
            grouped_bars(axis, groups)
            what = "a pair of blocks" if word == "training" else f"{reports[word]['prompt']} tokens a rank"
            axis.set(title=f"{word},\n{what}", xlabel="speed-up over\nsequential top-2")
        heading(figure, "ScMoE where about half of top-2's inference is communication")
        colors = {"this testbed, chosen schedule: 2 ranks on one CPU, shaped links": BLUE, PAPERS[SHARE].where: PAPER}
        rounds = " and ".join(sorted({str(report["rounds"]) for report in reports.values()}))
        bar_legend(figure, colors, f"quartiles of {rounds} rounds", "limit: no communication", ncols=1)


def training(report: dict[str, Any], row: str) -> tuple[Bar, bool]:
    """Return the bar of the faster of one chunk and several, and whether it has several."""
    ways = {name: own for name, own in report["rows"].items() if name in (row, row + PIPELINED)}
    name = max(ways, key=lambda name: ways[name]["train_speedup"])
    value = ways[name]["train_speedup"]
    bar = Bar(value, BLUE, f"{value:.2f}", ways[name]["train_quartiles"], report["limit_train"])
    return bar, name.endswith(PIPELINED)


def inference(report: dict[str, Any], row: str) -> tuple[Bar, bool]:
    """Return the bar of the planned way, and whether it has several chunks."""
    own = report["rows"][row]["prefill"]
    value = own["speedup"]
    way = own["auto"]  # such as `overlapped x 2`
    return Bar(value, BLUE, f"{value:.2f}", own["quartiles"], own["limit"]), way not in ("sequential", "overlapped x 1")


OURS = {"training": training, "inference": inference}
