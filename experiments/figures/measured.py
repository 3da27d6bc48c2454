"""The figures of the paper that show measurements, by their numbers. README's table of speed-ups is
written by docs/build/readme.py.

Fig. 1 and 8, how much time All-to-All takes and what hiding it gains, are drawn from reports of
`bench overlap`: one for each of the paper's hardware scenarios, which is emulated by its share of
communication. The paper prints the share f of the MoE module's time. The bench takes the share s of
a top-2 pair, which is smaller, because a pair has attention and an MLP too. With REST the time of
these over the module's computation,

    s = f / (f + (1 - f) (1 + REST))

REST follows from 8xA30-PCIe, where f is 0.60 and Table 1's rows imply an s of 0.52. For
8xA800-NVLink the formula then gives 0.11, which is what Table 2's rows imply.

Fig. 9 and 10 are drawn from a run that has measured them. Fig. 4 and 7 need no measurement
(unmeasured.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.row import rows_of
from experiments.bench.speed_chart import KIND_WORDS, conditions, speed_bars
from experiments.engine.bars import bar_legend, bars_height, grouped_bars
from experiments.figures.unmeasured import pair, timelines
from scmoe.charts import BLUE, ORANGE, RED, SKY, SMALL, chart, heading, title
from scmoe.config.derived import SHORTCUT_SCHEDULES
from scmoe.config.installation import scmoe
from scmoe.config.leaves import ConfigError
from scmoe.predict.row_names import PIPELINED, name_of
from scmoe.runs.seen import open_run
from scmoe.schedule.play import TRANSFERS
from scmoe.training.callbacks.representation_charts import draw_gating, draw_similarity

PCIE_MODULE, PCIE_PAIR = 0.60, 0.52
REST = (1 / PCIE_PAIR - 1) / (1 / PCIE_MODULE - 1) - 1
SHARE_COLORS = {
    "All-to-All": RED,
    "gate, encode, experts, decode": ORANGE,
    "attention and MLP": BLUE,
}


@dataclass(frozen=True, eq=False)
class Scenario:
    """One of the paper's machines. module_share: share of All-to-All in the MoE module's time
    (section 3 and Fig. 1).

    hidden: the share of ScMoE's communication that is hidden. over: ScMoE's speed over that of
    other rows, per pair.
    """

    name: str
    module_share: float
    hidden: float
    over: dict[str, float] = field(default_factory=dict)

    @property
    def pair_share(self) -> float:
        """Return the share of All-to-All in the forward time of a top-2 pair, in steps of 0.01."""
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

    sources: files that `bench overlap` has written, or folders of them. Its option --share says
    which scenario it is.
    """
    paths = [
        file
        for path in sources
        for file in (sorted(path.glob("overlap-*.json")) if path.is_dir() else [path])
    ]
    shares = {scenario.pair_share: scenario for scenario in SCENARIOS}
    allowed = ", ".join(f"{share:g} ({scenario.name})" for share, scenario in shares.items())
    reports: Reports = {}
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            scenario = shares.get(report["wanted_share"])
            complete = {"top2_operators_ms", "fastest_scmoe"} <= report.keys()
            level = report["level"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no report of bench overlap: {error!r}") from error
        if scenario is None:
            raise ConfigError(
                f"{path} was measured at --share {report['wanted_share']}, allowed: {allowed}"
            )
        if not complete:
            raise ConfigError(
                f"{path} has the rows {', '.join(report['rows'])}, but top2 and one of ScMoE are"
                " needed. Measure them"
            )
        if level != "block":
            raise ConfigError(f"{path} is of --level {level}, allowed: block")
        for option, usual in (("every", 2), ("top_k", 1), ("layout", None)):
            if (value := report.get(option, usual)) != usual:
                name = f"--{option.replace('_', '-')}"
                raise ConfigError(
                    f"{path} is of {name} {value}, allowed: {usual or 'none'}, as in the paper"
                )
        if scenario in reports:
            raise ConfigError(
                f"{path} is the second report at --share {scenario.pair_share:g}. Name one file for"
                " each share in place of their folder"
            )
        first = next(iter(reports.values()), report)
        for option in ("compute", "ranks", "device"):
            if report[option] != first[option]:
                raise ConfigError(
                    f"{path} has {option} {report[option]}, others {first[option]}. Name reports of"
                    " one of them"
                )
        reports[scenario] = report
    if not reports:
        where = ", ".join(map(str, sources)) or "nothing"
        writes = f"{scmoe('bench', 'overlap')} writes them"
        raise ConfigError(
            f"reports of bench overlap are looked for in {where}: none is there; {writes}"
        )
    return {scenario: reports[scenario] for scenario in SCENARIOS if scenario in reports}


def module_share(report: dict[str, Any], kind: str) -> float:
    """Return the share of All-to-All in the time of top-2's MoE module. kind: forward or train."""
    operators = report["top2_operators_ms"][kind]
    return sum(operators[transfer] for transfer in TRANSFERS) / sum(operators.values())


def draw_shares(reports: Reports, path: Path) -> None:
    """Draw Fig. 1: the time of a sequential top-2 pair as All-to-All, the module's computation, and
    the rest."""
    with chart(path, 1.4 + 1.6 * len(reports)) as figure:
        panels = figure.subplots(len(reports), 1, squeeze=False)[:, 0]
        for axis, (scenario, report) in zip(panels, reports.items(), strict=True):
            for y, (kind, word) in enumerate(KIND_WORDS.items()):
                share, of_module = 1 - 1 / report[f"limit_{kind}"], module_share(report, kind)
                widths = share, share / of_module - share, 1 - share / of_module
                for i, color in enumerate(SHARE_COLORS.values()):
                    axis.barh(y, widths[i], 0.4, left=sum(widths[:i]), color=color)
                text = (
                    f"{word}: {100 * share:.0f} % of the pair, {100 * of_module:.0f} % of the MoE"
                    " module"
                )
                axis.text(0, y - 0.25, text, va="bottom", fontsize=SMALL)
            axis.set(ylim=(1.3, -0.7), xlim=(0, 1))
            axis.set_yticks([])
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            of_module, of_pair = 100 * scenario.module_share, 100 * scenario.pair_share
            title(
                axis,
                f"{scenario.name}\npaper: {of_module:.0f} % of the MoE module, so {of_pair:.0f} %"
                " of a pair",
            )
        heading(figure, f"Fig. 1: All-to-All in sequential top-2, {conditions(*reports.values())}")
        bar_legend(figure, SHARE_COLORS, ncols=1)


def draw_speeds(reports: Reports, path: Path) -> None:
    """Draw Fig. 8: for each scenario a panel of inference and one of training, and how much faster
    ScMoE is."""
    panels = {
        scenario: {kind: speed_bars(report, kind, None) for kind in KIND_WORDS}
        for scenario, report in reports.items()
    }
    heights = [bars_height(groups["train"]) for groups in panels.values()]
    words = {scenario: _words(scenario, report) for scenario, report in reports.items()}
    above = [0.55 + 0.17 * len(lines) for lines in words.values()]
    with chart(path, 1.9 + sum(heights) + sum(above)) as figure:
        rows = figure.subplots(
            len(panels), len(KIND_WORDS), sharey="row", height_ratios=heights, squeeze=False
        )
        for axes, (scenario, of_kinds) in zip(rows, panels.items(), strict=True):
            for axis, (kind, groups) in zip(axes, of_kinds.items(), strict=True):
                grouped_bars(axis, groups)
                axis.annotate(
                    KIND_WORDS[kind],
                    (0, 1),
                    (0, 5),
                    xycoords="axes fraction",
                    textcoords="offset points",
                )
            axes[0].set_title("\n".join(words[scenario]), pad=24)
        for axis in rows[-1]:
            axis.set_xlabel("speed-up over\nsequential top-2")
        first = next(iter(reports.values()))
        heading(
            figure,
            f"Fig. 8: a pair of blocks, {conditions(*reports.values())}\nRatios are of inference,"
            " training",
        )
        colors = {"one chunk": BLUE, "pipelined (2 or 4 chunks)": SKY}
        limit = "limit: all of top-2's communication hidden"
        bar_legend(figure, colors, f"quartiles of {first['rounds']} rounds", limit, ncols=1)


def _words(scenario: Scenario, report: dict[str, Any]) -> list[str]:
    """Return what is above a scenario's panels: its shares, and ScMoE's speed over that of other
    rows that were measured."""
    fastest = report["fastest_scmoe"]
    hidden = 100 * rows_of(report)[fastest["row"]].overlap_forward
    lines = [
        f"{scenario.name}: {100 * report['comm_share']:.0f} % of inference is All-to-All,",
        f"{hidden:.0f} % of ScMoE's is hidden (paper: {100 * scenario.hidden:.0f} %)",
    ]
    for row in scenario.over or ("shared_expert",):
        if row not in fastest["over"]["forward"]:
            continue
        values = ", ".join(f"{fastest['over'][kind][row][1]:.2f}" for kind in KIND_WORDS)
        name = (
            f"pipelined {name_of(row).removeprefix('Standard ')}"
            if row.endswith(PIPELINED)
            else name_of(row)
        )
        printed = f" (paper: {scenario.over[row]:.2f})" if scenario.over else ""
        lines.append(f"ScMoE over {name}: {values}{printed}")
    return lines


PAGES = Path("docs/figures")
PRINTED = (".png", ".pdf")
EXPLAINED = {4: pair, 7: timelines}
OF_REPORTS = {1: draw_shares, 8: draw_speeds}
OF_A_RUN = {9: ("gating", draw_gating), 10: ("similarity", draw_similarity)}
ARCHITECTURE_WORDS = {
    "scmoe": "ScMoE",
    "dgmoe": "DGMoE",
    "dgmoe_share": "DGMoE-Share",
    "top_k": "Standard top-{moe.top_k}",
    "shared_expert": "Shared-expert",
    "dense": "dense",
}


def draw_figure(number: int, sources: Sequence[str], out: Path | None) -> list[Path]:
    """Draw a figure of the paper and return its files: PNG, and PDF for print. Raises ConfigError.

    sources: the directory of a run, or files and folders of reports of `bench overlap`. out: None:
    beside the sources.
    """
    if number in EXPLAINED:
        if sources:
            measured = f"To measure Fig. 7, run {scmoe('bench', 'timeline')}"
            raise ConfigError(
                f"Fig. {number} is a drawing without data. Leave {sources[0]!r} out. {measured}"
            )
        path = (out or PAGES) / f"{EXPLAINED[number].__name__}.png"
        EXPLAINED[number](path)
        return [path]
    if number in OF_A_RUN:
        return draw_run(number, sources, out)
    reports = read_reports([Path(source) for source in sources])
    folder = Path(sources[0])
    files = [
        (out or (folder if folder.is_dir() else folder.parent)) / f"figure-{number}{end}"
        for end in PRINTED
    ]
    for path in files:
        OF_REPORTS[number](reports, path)
    return files


def draw_run(number: int, sources: Sequence[str], out: Path | None) -> list[Path]:
    """Draw what the callback `Analysis` has measured in a run, and write it as JSON too."""
    if len(sources) != 1:
        raise ConfigError(
            f"Fig. {number} shows one run, and {len(sources)} are given. Give one run directory"
        )
    name, _ = OF_A_RUN[number]
    run = open_run(sources[0])
    path, key = run.path / "analysis" / f"{name}.npz", f"analysis.{name}_every"
    if not path.exists():
        required = (
            f"Fig. {number} requires a run that was trained with {key}=N, N in optimizer steps"
        )
        raise ConfigError(
            f"{key} is {run.config[key]} in {run.path}, and there is no analysis/{name}.npz;"
            f" {required}"
        )
    with np.load(path, allow_pickle=False) as stored:
        figure = {"number": number, "words": run_title(number, run.config)}
        figure |= {name: stored[name].tolist() for name in ("steps", "labels", "values")}
    *drawn, data = [(out or path.parent) / f"figure-{number}{end}" for end in (*PRINTED, ".json")]
    for file in drawn:
        draw_measured(figure, file)
    data.write_text(json.dumps(figure) + "\n", encoding="utf-8")
    return [*drawn, data]


def run_title(number: int, config: Mapping[str, str]) -> str:
    """Return the title of a figure of a run: its model as the paper would name it, and its data."""
    architecture, family = config["moe.architecture"], config["model.family"].upper()
    position = (
        f" ({config['moe.position'].replace('pos', 'Pos-')})"
        if architecture in SHORTCUT_SCHEDULES
        else ""
    )
    words = ARCHITECTURE_WORDS.get(architecture, architecture)
    name = words.replace("{moe.top_k}", config["moe.top_k"]) + position
    size = f"{config['model.layers']} layers, width {config['model.dim']}"
    return f"Fig. {number}: {family}, {size}, {name}, {config['data.name']}"


def draw_measured(figure: dict[str, Any], path: Path) -> None:
    """Draw Fig. 9 or 10 from what the figure's JSON holds."""
    _, draw = OF_A_RUN[figure["number"]]
    draw(figure["steps"], figure["labels"], np.array(figure["values"]), path, words=figure["words"])
