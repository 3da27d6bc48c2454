"""Fig. 1 and Fig. 8: how much time All-to-All takes, and what hiding it gains, in the paper's hardware scenarios.

Both are drawn from reports of `bench overlap`, one for each scenario, which is emulated by its share of communication.
The paper prints the share f of the MoE module's time. The bench takes the share s of a top-2 pair, which is smaller,
because a pair has attention and an MLP too. With REST the time of these over the module's computation,

    s = f / (f + (1 - f) (1 + REST))

REST follows from 8xA30-PCIe, where f is 0.60 and Table 1's rows imply an s of 0.52. For 8xA800-NVLink the formula then
gives 0.11, which is what Table 2's rows imply.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scmoe.charts import PAPER, SMALL, chart, title
from scmoe.config.leaves import ConfigError
from scmoe.schedule.timeline import TRANSFERS
from scmoe.testbed.overlap_report import bars

PCIE_MODULE, PCIE_PAIR = 0.60, 0.52
REST = (1 / PCIE_PAIR - 1) / (1 / PCIE_MODULE - 1) - 1
KINDS = (("forward", "forward"), ("train", "training"))
COLORS = {"All-to-All": "#e15759", "gate, encode, experts, decode": "#f28e2b", "attention and MLP": "#4e79a7"}


@dataclass(frozen=True, eq=False)
class Scenario:
    """One of the paper's machines. module_share: share of All-to-All in the MoE module's time (section 3 and Fig. 1).

    hidden: the share of ScMoE's communication that is hidden. over: ScMoE's speed over that of other rows, per pair.
    """

    name: str
    module_share: float
    hidden: float
    over: dict[str, float] = field(default_factory=dict)

    @property
    def pair_share(self) -> float:
        """The share of All-to-All in the forward time of a top-2 pair, in steps of 0.01."""
        f = self.module_share
        return round(f / (f + (1 - f) * (1 + REST)), 2)


PCIE_OVER = {"shared_expert": 1.27, "top2_pipelined": 1.42, "top1_pipelined": 1.15}
SCENARIOS = (
    Scenario("8xA30-PCIe", PCIE_MODULE, 0.70, PCIE_OVER),
    Scenario("16xA800, two nodes", 0.50, 1.0, {"shared_expert": 1.24, "top2_pipelined": 1.43}),
    Scenario("8xA800-NVLink", 0.15, 1.0),
)
Reports = dict[Scenario, dict[str, Any]]


def read_reports(sources: Sequence[Path]) -> Reports:
    """Return the report of each scenario that has one, in the paper's order. Raises ConfigError.

    sources: files that `bench overlap` has written, or folders of them. Its option --share says which scenario it is.
    """
    paths = [file for path in sources for file in (sorted(path.glob("overlap-*.json")) if path.is_dir() else [path])]
    shares = {scenario.pair_share: scenario for scenario in SCENARIOS}
    allowed = ", ".join(f"{share:g} ({scenario.name})" for share, scenario in shares.items())
    found: Reports = {}
    for path in paths:
        try:
            report = json.loads(path.read_text())
            scenario = shares.get(report["wanted_share"])
            complete = {"top2_operators_ms", "fastest_scmoe"} <= report.keys()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no report of bench overlap: {error!r}; make figure8 writes them") from error
        if scenario is None:
            raise ConfigError(f"{path} was measured at --share {report['wanted_share']}, allowed: {allowed}")
        if not complete:
            raise ConfigError(f"{path} has the rows {', '.join(report['rows'])}, required: top2 and one of ScMoE")
        if scenario in found:
            raise ConfigError(f"{path} is the second report at --share {scenario.pair_share:g}, allowed: one of each")
        found[scenario] = report
    if not found:
        where = ", ".join(map(str, sources)) or "nothing"
        raise ConfigError(
            f"reports of bench overlap are looked for in {where}: none is there; make figure8 writes them"
        )
    return {scenario: found[scenario] for scenario in SCENARIOS if scenario in found}


def module_share(report: dict[str, Any], kind: str) -> float:
    """Return the share of All-to-All in the time of top-2's MoE module. kind: forward or train."""
    operators = report["top2_operators_ms"][kind]
    return sum(operators[transfer] for transfer in TRANSFERS) / sum(operators.values())


def conditions(report: dict[str, Any]) -> str:
    links = next(iter(report["rows"].values()))["links"]
    words = {"shaped": "shaped links between", "loopback": "loopback as it is between", "bus": "the bus of"}
    return f"{report['compute']} compute, {words[links]} {report['ranks']} ranks ({report['device']})"


def draw_shares(reports: Reports, path: Path) -> None:
    """Draw Fig. 1: the time of a sequential top-2 pair as All-to-All, the module's computation, and the rest."""
    ticks: dict[float, str] = {}
    place = 0.0
    with chart(path, 1.7 + 1.05 * len(reports)) as figure:
        axis = figure.subplots()
        for scenario, report in reports.items():
            for kind, word in KINDS:
                share, of_module = 1 - 1 / report[f"limit_{kind}"], module_share(report, kind)
                widths = share, share / of_module - share, 1 - share / of_module
                for i, (part, color) in enumerate(COLORS.items()):
                    label = part if not ticks else None
                    axis.barh(place, widths[i], 0.85, left=sum(widths[:i]), color=color, label=label)
                what = "pair" if report["level"] == "block" else "iteration"
                text = f" {100 * share:.0f} % of the {what}, {100 * of_module:.0f} % of the MoE module"
                axis.text(0, place, text, va="center", color="white", fontsize=9, fontweight="bold")
                ticks[place] = word
                place += 1
            text = f"{scenario.name}. Paper: {100 * scenario.module_share:.0f} % of the MoE module"
            text += f", so {100 * scenario.pair_share:.0f} % of a pair"
            axis.text(0, place - 2.55, text, va="bottom", color=PAPER, fontsize=9)
            place += 0.7
        axis.set_yticks(list(ticks), list(ticks.values()))
        axis.set(ylim=(place - 1.2, -1.4), xlim=(0, 1))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        title(axis, f"All-to-All in sequential top-2:\n{conditions(next(iter(reports.values())))}")
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.2)


def draw_speeds(reports: Reports, path: Path) -> None:
    """Draw Fig. 8: a panel of speed-ups for each scenario, and in numbers how much faster ScMoE is."""
    heights = [len(report["rows"]) for report in reports.values()]
    with chart(path, 1.3 + 0.42 * sum(heights) + 1.3 * len(heights)) as figure:
        panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axis, (scenario, report) in zip(panels, reports.items(), strict=True):
            bars(axis, report)
            end = 1.05 * max(report["limit_forward"], *(row["forward_speedup"] for row in report["rows"].values()))
            axis.set_xlim(0, 1.75 * end)
            axis.set_xticks([0, 0.5, 1, *([1.5] if end > 1.5 else []), *([2] if end > 2 else [])])
            axis.set_ylim(top=-1.6)
            axis.text(1.03 * end, -0.6, "ScMoE over this row:\nforward, training", fontsize=SMALL, va="bottom")
            for place, row in enumerate(report["rows"]):
                if not row.startswith("scmoe"):
                    ratios = [report["fastest_scmoe"]["over"][kind][row][1] for kind, _ in KINDS]
                    papers = f" (paper: {scenario.over[row]:.2f})" if row in scenario.over else ""
                    text = ", ".join(f"{ratio:.2f}" for ratio in ratios) + papers
                    axis.text(1.03 * end, place, text, fontsize=SMALL, va="center")
            hidden = report["rows"][report["fastest_scmoe"]["row"]]["overlap_forward"]
            share = f"{scenario.name}: All-to-All is {100 * report['comm_share']:.0f} % of top-2 forward"
            title(axis, f"{share}\n{100 * hidden:.0f} % of ScMoE's is hidden (paper: {100 * scenario.hidden:.0f} %)")
        panels[-1].set_xlabel("speed-up over sequential top-2")
        figure.suptitle(conditions(next(iter(reports.values()))), x=0.02, ha="left", fontsize=10.5)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
