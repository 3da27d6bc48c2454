"""The report of `bench inference`: what overlap gains in prefill and in decode, with the limit of each row.

Ratios are to sequential top-2 in the same shape, taken round by round, medians. A row's limit is its own time without
transfers.
"""

import json
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from scmoe.config.extras import require
from scmoe.config.leaves import ConfigError
from scmoe.experiments.bench.inference import BLOCKS, CHUNKS, SHAPES, measure
from scmoe.experiments.bench.pairs import Setting, default_schedule
from scmoe.experiments.bench.speed_chart import PAPERS, Printed, name_of
from scmoe.experiments.engine.ranks import run_ranks
from scmoe.planning.inference_planner import InferencePlan
from scmoe.probes.charts import BLUE, PAPER, RED, Bar, bar_legend, chart, grouped_bars, heading, height_of

OVERLAPPED = tuple(f"overlapped x {chunks}" for chunks in CHUNKS)
WAYS = ("sequential", *OVERLAPPED)


def bench_inference(share: float, prompt: int, batch: int, rounds: int, ranks: int, out: Path) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into the folder `out`. Returns the report.

    share: of communication in a sequential top-2 prefill of `prompt` tokens a rank. batch: texts that a rank decodes.
    The program must be in a network namespace (links.enter). ConfigError: an option that cannot be honoured.
    """
    require("bench inference", "matplotlib")
    check(prompt, batch, ranks)
    setting = Setting(share, compute="real", rounds=rounds, tokens=prompt, seq_len=prompt)
    result = run_ranks(measure, ranks, setting, batch, timeout_s=3600, own_links=True)[0]
    report = summary(setting, batch, ranks, result)
    show(report)
    name = f"inference-{ranks}-ranks-share-{share:g}"
    (out / f"{name}.json").write_text(json.dumps(report, indent=1))
    draw(report, out / f"{name}.png")
    print(f"chart and figures: {out / name}.png, .json", file=sys.stderr)
    return report


def check(prompt: int, batch: int, ranks: int) -> None:
    """Raise ConfigError for what cannot be measured."""
    experts = Setting.num_experts
    if ranks < 2 or experts % ranks:
        raise ConfigError(f"--ranks is {ranks}, allowed: divisors of the {experts} experts from 2 on")
    for option, tokens in (("prompt", prompt), ("batch", batch)):
        if tokens < experts or tokens % experts:
            raise ConfigError(
                f"--{option} is {tokens}, allowed: multiples of {experts}, so that experts get equal shares"
            )


def summary(setting: Setting, batch: int, ranks: int, result: dict[str, Any]) -> dict[str, Any]:
    """Return the medians of the rounds, by row. result: what `measure` returned on rank 0."""
    times = {(way.block, way.shape, way.name): seconds for way, seconds in result["times"].items()}
    schedules = {(way.block, way.shape, way.name): way.schedule for way in result["times"]}

    def shape_of(block: str, shape: str) -> dict[str, Any]:
        baseline = times["top2", shape, "sequential"]
        plan: InferencePlan = result["plans"][block, shape]
        auto = f"overlapped x {plan.schedules[0].chunks}" if plan.overlapped else "sequential"
        ratios = {name: baseline / times[block, shape, name] for name in (*WAYS, "free")}
        return {
            "speedup": median(ratios[auto]),
            "quartiles": quantiles(ratios[auto], n=4)[::2],
            "auto": auto,
            "ms": 1e3 * median(times[block, shape, auto]),
            "limit": median(ratios["free"]),
            "gain": median(times[block, shape, "sequential"] / times[block, shape, auto]),
            "ways": {name: median(ratios[name]) for name in WAYS},
            "slots": {name: schedules[block, shape, name].slot for name in OVERLAPPED},
        }

    def row(block: str) -> dict[str, Any]:
        prefill, decode = (shape_of(block, shape) for shape in SHAPES)
        return {
            "prefill_speedup": prefill["speedup"],
            "decode_speedup": decode["speedup"],
            "ttft_ms": prefill["ms"],
            "tpot_ms": decode["ms"],
            "prefill_tokens_per_s": 1e3 * ranks * setting.tokens / prefill["ms"],
            "decode_tokens_per_s": 1e3 * ranks * batch / decode["ms"],
            "prefill": prefill,
            "decode": decode,
        }

    shares = {shape: median(1 - times["top2", shape, "free"] / times["top2", shape, "sequential"]) for shape in SHAPES}
    return {
        "wanted_share": setting.share,
        "comm_share": shares,
        "link_mbit": result["rate"],
        "ranks": ranks,
        "prompt": setting.tokens,
        "batch": batch,
        "rounds": setting.rounds,
        "rows": {name_in_report(block): row(block) for block in BLOCKS},
    }


def name_in_report(block: str) -> str:
    return f"scmoe_{block}" if default_schedule(block).architecture == "scmoe" else block


def show(report: dict[str, Any]) -> None:
    shares = report["comm_share"]
    words = (
        f"{report['ranks']} ranks, prompts of {report['prompt']} tokens, {report['batch']} texts decoded a rank; "
        f"communication share of sequential top-2: prefill {shares['prefill']:.2f}, decode {shares['decode']:.2f}; "
        f"medians of {report['rounds']} rounds"
    )
    numbers = (*WAYS, "free: limit", "auto", "[quartiles]", "ms", "tokens/s")
    for shape in SHAPES:
        columns = (Column(name, justify="right", no_wrap=True) for name in numbers)
        table = Table(Column(shape, no_wrap=True), *columns, title=words, title_justify="left")
        for name, row in report["rows"].items():
            own = row[shape]
            ways = [f"{own['ways'][way]:.2f}" for way in WAYS]
            quartiles = "[{:.2f} {:.2f}]".format(*own["quartiles"])
            speed = f"{own['ms']:.1f}", f"{row[f'{shape}_tokens_per_s']:,.0f}"
            table.add_row(name, *ways, f"{own['limit']:.2f}", own["auto"], quartiles, *speed)
        Console(stderr=True, width=170).print(table)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw each row sequential and as planned, with its limit, for prefill and decode."""
    paper = PAPERS.get(report["wanted_share"])
    panels = {shape: bars(report, shape, paper if shape == "prefill" else None) for shape in SHAPES}
    lines = 3 if paper else 2
    with chart(path, 2.5 + height_of(panels["prefill"], lines)) as figure:
        for axis, (shape, groups) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            grouped_bars(axis, groups, lines=lines)
            tokens = f"{report['prompt']} tokens" if shape == "prefill" else f"{report['batch']} texts"
            share = 100 * report["comm_share"][shape]
            axis.set(title=f"{shape}, {tokens} a rank,\n{share:.0f} % communication")
            axis.set_xlabel("speed-up over\nsequential top-2")
        links = f"links of {report['link_mbit']:.0f} Mbit/s between {report['ranks']} ranks on one CPU"
        heading(figure, f"Inference, a pair of blocks, real compute, {links}")
        colors = {"sequential": RED, "as planned": BLUE} | ({paper.where: PAPER} if paper else {})
        quartiles = f"quartiles of {report['rounds']} rounds"
        bar_legend(figure, colors, quartiles, "limit: the same row without transfers", ncols=1)


def bars(report: dict[str, Any], shape: str, paper: Printed | None) -> dict[str, list[Bar]]:
    """Return the bars of each architecture: sequential, as planned, and the paper's inference."""
    groups = {}
    for row, both in report["rows"].items():
        own = both[shape]
        sequential, planned = own["ways"]["sequential"], own["speedup"]
        group = [
            Bar(sequential, RED, f"{sequential:.2f}", limit=own["limit"]),
            Bar(planned, BLUE, f"{planned:.2f}", own["quartiles"], own["limit"]),
        ]
        if paper and row in paper.rows:
            group.append(Bar(paper.rows[row]["forward"], PAPER, f"{paper.rows[row]['forward']:.2f}"))
        groups[name_of(row)] = group
    return groups
