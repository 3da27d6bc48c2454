"""The report of `bench inference`: prefill and decode between ranks (prefill_decode.py), and
generation with a cache and without in one process without transfers (generation.py).

Ratios are to sequential top-2 in the same shape at the same load, taken round by round, medians. A
row's limit is its own time without transfers.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.bench.inference import generation
from experiments.bench.inference.pass_figures import (
    SHAPES,
    PassAtLoad,
    PassFigures,
    Shape,
    passes_of,
)
from experiments.bench.inference.prefill_decode import (
    IN_TWO_BATCHES,
    MEASURED_BLOCKS,
    MeasuredPasses,
    measure,
    row_name,
)
from experiments.bench.other_settings import InferenceSetting
from experiments.bench.overlap.row_figures import over_fastest
from experiments.bench.overlap.uneven import LoadPoint, draw_lines
from experiments.bench.rate_search import warn_of_share
from experiments.bench.row import to_json
from experiments.bench.setting import NUM_EXPERTS
from experiments.bench.speed_chart import OVER_TOP2, Printed, printed_speedups
from experiments.bench.two_batches import stated_or_of_medians
from experiments.engine import links
from experiments.engine.bars import Bar, bar_legend, bars_height, grouped_bars
from experiments.engine.ranks import run_ranks
from scmoe.charts import BLUE, GREEN, PAPER, RED, chart, heading
from scmoe.config.installation import require
from scmoe.config.leaves import ConfigError
from scmoe.loads import BALANCED, Sizes, check_load, imbalance, load_of, loads_suffix
from scmoe.planning.clock import median, quartiles
from scmoe.predict.row_names import architecture_of, batches_of, name_of
from scmoe.report import Report, publish, say

Passes = Mapping[Shape, PassFigures]  # of a row
GENERATE_ROUNDS = 3  # a text without a cache takes seconds
AUTO: dict[Shape, str] = {"prefill": "overlapped x 1", "decode": "sequential"}
Pass = tuple[str, Shape, str]  # row, shape, transfers


def bench_inference(setting: InferenceSetting, out: Path) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into the folder `out`. Return the
    report.

    With loads the report has one of each in `loads`. The program starts again in a network
    namespace. ConfigError: an option that cannot be honoured.
    """
    require("bench inference", "matplotlib")
    check(setting)
    links.require()
    measured = run_ranks(measure, setting.ranks, setting, timeout_s=3600, own_links=True)[0]
    report = summary(measured[BALANCED])
    warn_of_share(setting.share, report["comm_share"]["prefill"])
    if setting.new_tokens:
        say(f"generating {generation.TEXTS} texts of {setting.new_tokens} tokens")
        words = (setting.new_tokens, GENERATE_ROUNDS)
        alone = run_ranks(generation.measure, 1, *words, timeout_s=3600)[0]
        report["generate"] = alone.report()
    if setting.loads:
        report["loads"] = [
            uneven_report(measured[load], measured[BALANCED], load) for load in setting.loads
        ]
    publish(report, tables(report), draw, out / name_of_report(setting))
    return report


def name_of_report(setting: InferenceSetting) -> str:
    """Return the name of the report's files, without a suffix: what is not usual is in it."""
    usual = InferenceSetting()
    words = [f"inference-{setting.ranks}-ranks-share-{setting.share:g}"]
    if setting.loads:
        words.insert(0, "uneven")
    if setting.prompt != usual.prompt:
        words.append(f"prompt-{setting.prompt}")
    if setting.texts != usual.texts:
        words.append(f"{setting.texts}-texts")
    if setting.batch != usual.batch:
        words.append(f"batch-{setting.batch}")
    return "-".join(words) + loads_suffix(setting.loads)


def check(setting: InferenceSetting) -> None:
    """Raise ConfigError for what cannot be measured."""
    for option, number in (("prompt", setting.prompt), ("batch", setting.batch)):
        if number < NUM_EXPERTS or number % NUM_EXPERTS:
            allowed = f"multiples of {NUM_EXPERTS}, so that experts get equal shares"
            raise ConfigError(f"--{option} is {number}, allowed: {allowed}")
    for uneven in map(load_of, setting.loads):
        if uneven.kind == "ragged":
            raise ConfigError(
                f"--load is {uneven.name}, but all prompts have the same length. Give another"
                " kind of load."
            )
        for top_k in {*map(setting.pair.top_k_of, MEASURED_BLOCKS)}:
            check_load(uneven, Sizes(NUM_EXPERTS, top_k, setting.ranks), setting.texts)


def pass_times(measured: MeasuredPasses) -> dict[Pass, Any]:
    """Return the seconds of each pass by rounds."""
    return {
        (row_name(v), shape, v.transfers): seconds
        for (shape, v), seconds in measured.seconds.items()
    }


def auto_transfers(row: str, shape: Shape) -> str:
    """Return how `scmoe generate` runs the transfers of a row."""
    return IN_TWO_BATCHES if batches_of(row) == 2 else AUTO[shape]


def summary(measured: MeasuredPasses) -> dict[str, Any]:
    """Return the medians of the rounds, by row."""
    return load_report(measured, rows_from(measured))


def load_report(measured: MeasuredPasses, rows: Mapping[str, Passes]) -> dict[str, Any]:
    """Return the report of one load."""
    setting, times = measured.setting, pass_times(measured)
    shares = {
        shape: median(1 - times["top2", shape, "free"] / times["top2", shape, "sequential"])
        for shape in SHAPES
    }
    return {
        "setting": asdict(setting),
        "wanted_share": setting.share,
        "comm_share": shares,
        "link_mbit": measured.rate,
        "ranks": setting.ranks,
        "prompt": setting.prompt,
        "texts": setting.texts,
        "batch": setting.batch,
        "rounds": setting.rounds,
        "rows": to_json(rows),
    }


def rows_from(measured: MeasuredPasses) -> dict[str, Passes]:
    """Return the figures of each row, those with two batches in flight behind their own: they have
    no decode."""
    setting, times = measured.setting, pass_times(measured)
    tokens: dict[Shape, int] = {"prefill": setting.texts * setting.prompt, "decode": setting.batch}
    schedules = {(row_name(v), shape, v.transfers): v.schedule for shape, v in measured.seconds}

    def pass_of(row: str, shape: Shape) -> PassFigures:
        auto = auto_transfers(row, shape)
        in_shape = {
            (name, transfers): s for (name, each, transfers), s in times.items() if each == shape
        }
        seconds = {transfers: s for (name, transfers), s in in_shape.items() if name == row}
        overlapped = {
            transfers: schedules[row, shape, transfers]
            for transfers in seconds
            if transfers not in ("sequential", "free")
        }
        ratios = {
            transfers: times["top2", shape, "sequential"] / s for transfers, s in seconds.items()
        }
        rivals = {
            f"{name}, {transfers}": s
            for (name, transfers), s in in_shape.items()
            if transfers != "free" and architecture_of(name) == "top2"
        }
        median_s = median(seconds[auto])
        return PassFigures(
            speedup=median(ratios[auto]),
            quartiles=quartiles(ratios[auto]),
            auto=auto,
            ms=1e3 * median_s,
            tokens_per_s=setting.ranks * tokens[shape] / median_s,
            limit=median(ratios.pop("free")),
            gain=median(times[architecture_of(row), shape, "sequential"] / seconds[auto]),
            ways={transfers: median(ratio) for transfers, ratio in ratios.items()},
            slots={transfers: schedule.slot for transfers, schedule in overlapped.items()},
            inside_attention={
                transfers: schedule.inside_attention for transfers, schedule in overlapped.items()
            },
            over_best_without_another_model=over_fastest(seconds[auto], rivals),
        )

    names = dict.fromkeys(row for row, _, _ in times)
    return {
        row: {shape: pass_of(row, shape) for shape in SHAPES if (row, shape, "free") in times}
        for row in names
    }


def uneven_report(measured: MeasuredPasses, balanced: MeasuredPasses, load: str) -> dict[str, Any]:
    """Return the report of a load: for each row and shape also the time of `auto` over its balanced
    one."""
    setting = measured.setting
    even, even_times = rows_from(balanced), pass_times(balanced)
    times = pass_times(measured)

    def beside_balanced(row: str, shape: Shape, figures: PassFigures) -> PassFigures:
        auto = auto_transfers(row, shape)
        over = times[row, shape, auto] / even_times[row, shape, auto]
        return replace(
            figures,
            at_load=PassAtLoad(
                over_balanced=median(over),
                over_balanced_quartiles=quartiles(over),
                balanced=even[row][shape].speedup,
                **imbalance_of(setting, load, row, shape),
            ),
        )

    rows = {
        row: {shape: beside_balanced(row, shape, figures) for shape, figures in passes.items()}
        for row, passes in rows_from(measured).items()
    }
    made = imbalance_of(setting, load, "top2", "prefill")
    return {"load": {"name": load, **made}, **load_report(measured, rows)}


def imbalance_of(setting: InferenceSetting, load: str, row: str, shape: Shape) -> dict[str, float]:
    """Return how uneven a load makes the routing of a pass."""
    block = architecture_of(row).removeprefix("scmoe_")
    sizes = Sizes(NUM_EXPERTS, setting.pair.top_k_of(block), setting.ranks)
    if shape == "prefill":
        return imbalance(load_of(load), sizes, setting.texts, setting.prompt)
    return imbalance(load_of(load), sizes, 1, setting.batch)


def draw_loads(report: dict[str, Any], path: Path) -> None:
    """Draw the time of an overlapped prefill over the balanced one."""
    lines: dict[str, list[LoadPoint]] = {row: [] for row in report["rows"]}
    for one_load in report["loads"]:
        for row, prefill in passes_of(one_load, "prefill").items():
            uneven = prefill.at_load
            assert uneven is not None
            point = LoadPoint(
                uneven.max_over_mean_ranks, uneven.over_balanced, uneven.over_balanced_quartiles
            )
            lines[row].append(point)
    names = {row: name_of(row) for row in lines}
    share = f"communication share {report['comm_share']['prefill']:.2f}"
    words = (
        f"Uneven routing, prefill of {prompts_of(report)} tokens, real compute, {report['ranks']}"
        f" ranks, {share}"
    )
    draw_lines(lines, names, path, words, "prefill over its balanced one")


def prompts_of(report: Mapping[str, Any]) -> str:
    """Return the prompts of a rank in prefill, such as `4 x 512`."""
    texts = report.get("texts", 1)
    return f"{texts} x {report['prompt']}" if texts > 1 else str(report["prompt"])


def tables(report: dict[str, Any]) -> list[Report]:
    """Return a table for each shape, at balance and at each load, and those of the generation.

    Speed-ups are over sequential top-2 at that load.
    """
    reports = report, *report.get("loads", ())
    shapes = [passes_table(each, shape) for each in reports for shape in SHAPES]
    return shapes + generation.tables(report["generate"]) if "generate" in report else shapes


def passes_table(report: dict[str, Any], shape: Shape) -> Report:
    passes = passes_of(report, shape)
    columns = {
        "sequential": "{ways[sequential]:.2f}",
        "1, 2, 4 chunks": (
            "{ways[overlapped x 1]:.2f}, {ways[overlapped x 2]:.2f}, {ways[overlapped x 4]:.2f}"
        ),
        "plan": "{speedup:.2f} [{quartiles[0]:.2f}, {quartiles[1]:.2f}]",
        "its way": "{auto}",
        "limit": "{limit:.2f}",
        "ms": "{ms:.1f}",
        "tokens/s": "{tokens_per_s:,.0f}",
    }
    columns[OVER_TOP2] = "{over_top2:.2f}"
    words = f"{prompts_of(report)} tokens a rank"
    if shape == "decode":
        words = "one token of {batch} texts a rank"
    words += (
        ", links of {link_mbit:.0f} Mbit/s, communication share"
        f" {report['comm_share'][shape]:.2f}"
    )
    if "load" in report:
        words = f"{report['load']['name']}, {words}"
        columns["imbalance: ranks, experts"] = (
            "{max_over_mean_ranks:.2f}, {max_over_mean_experts:.2f}"
        )
        columns |= {"over balanced": "{over_balanced:.2f}", "plan at balance": "{balanced:.2f}"}
    title = f"{shape.capitalize()}, {words}, medians of {{rounds}} rounds:".format_map(report)
    gains = over_top2(passes)
    cells = {
        name: {**to_json(figures), "over_top2": gains[name]} for name, figures in passes.items()
    }
    return Report(title, cells, columns)


def over_top2(passes: Mapping[str, PassFigures]) -> dict[str, float]:
    """Return what each row gains over the best of top-2's rows."""
    over = {row: figures.over_best_without_another_model for row, figures in passes.items()}
    stated = {row: None if each is None else each["median"] for row, each in over.items()}
    return stated_or_of_medians(stated, {row: each.speedup for row, each in passes.items()})


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw each row sequential and as planned, with its limit, for prefill and decode; with loads,
    as draw_loads."""
    if "loads" in report:
        return draw_loads(report, path)
    paper = printed_speedups(report)
    panels = {shape: bars(report, shape, paper if shape == "prefill" else None) for shape in SHAPES}
    in_halves = any(batches_of(row) == 2 for row in report["rows"])
    lines = 2 + (paper is not None) + in_halves
    with chart(path, 2.5 + bars_height(panels["prefill"], lines)) as figure:
        for axis, (shape, groups) in zip(
            figure.subplots(1, 2, sharey=True), panels.items(), strict=True
        ):
            grouped_bars(axis, groups, lines=lines)
            tokens = (
                f"{prompts_of(report)} tokens" if shape == "prefill" else f"{report['batch']} texts"
            )
            share = 100 * report["comm_share"][shape]
            axis.set(title=f"{shape}, {tokens} a rank,\n{share:.0f} % communication")
            axis.set_xlabel("speed-up over\nsequential top-2")
        links = (
            f"links of {report['link_mbit']:.0f} Mbit/s between {report['ranks']} ranks on one CPU"
        )
        heading(figure, f"Inference, a pair of blocks, real compute, {links}")
        colors = {"sequential": RED, "as planned": BLUE}
        if in_halves:
            colors["two batches in flight"] = GREEN
        if paper:
            colors[paper.where] = PAPER
        quartiles = f"quartiles of {report['rounds']} rounds"
        bar_legend(figure, colors, quartiles, "limit: the same row without transfers", ncols=1)


def bars(report: dict[str, Any], shape: Shape, paper: Printed | None) -> dict[str, list[Bar]]:
    """Return the bars of each architecture: sequential, as planned, with two batches in flight, and
    the paper's inference."""
    groups: dict[str, list[Bar]] = {}
    for row, figures in passes_of(report, shape).items():
        group = groups.setdefault(name_of(row), [])
        planned = figures.speedup
        color = GREEN if batches_of(row) == 2 else BLUE
        if batches_of(row) == 1:
            sequential = figures.ways["sequential"]
            group.append(Bar(sequential, RED, f"{sequential:.2f}", limit=figures.limit))
        group.append(Bar(planned, color, f"{planned:.2f}", figures.quartiles, figures.limit))
    for row, printed in paper.rows.items() if paper else ():
        if name_of(row) in groups:
            value = printed["forward"]
            groups[name_of(row)].append(Bar(value, PAPER, f"{value:.2f}"))
    return groups
