"""`bench inference`: what overlap gains in prefill and in decode, in small GPTs of one pair of
blocks, on links whose rate gives prefill a share of communication.

    prefill   each rank reads a prompt into an empty cache: the time to the first token
    decode    each rank reads one token of each of `batch` texts, whose prompts are in the cache:
              the time of a token
    ways      sequential; overlapped with 1, 2 and 4 chunks, at the best slots for the shape; free,
              without transfers
    auto      as `scmoe generate` runs them: prefill overlapped in one chunk, decode sequential

    generate  texts with a cache and without, in one process without transfers (generation.py)

The models are dropless. Their experts get equal shares, or with `--load` those of uneven routing
(loads.py), measured beside the balanced one. Ratios are to sequential top-2 in the same shape,
taken round by round, medians. A row's limit is its own time without transfers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.bench import emulated, generation
from experiments.bench.overlap import find_rate, say, warn_of_share
from experiments.bench.pairs import Setting, check_ranks, default_schedule
from experiments.bench.passes import PASSES, Shape, a_pass, best_schedules, pass_seconds
from experiments.bench.speed_chart import PAPERS, Printed, name_of
from experiments.bench.stacks import Variant, make_blocks
from experiments.bench.uneven import Point, draw_lines, heat_of
from experiments.engine import links
from experiments.engine.bars import Bar, bar_legend, grouped_bars, height_of
from experiments.engine.clock import CPU, in_turn, median, quartiles
from experiments.engine.ranks import run_ranks
from scmoe.config.extras import require
from scmoe.config.leaves import ConfigError
from scmoe.models.decoder import GPT
from scmoe.moe.dispatcher import Blocking, Pending, Ready, Receipt
from scmoe.parallel.mesh import build_context
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher, ReadByHost
from scmoe.probes.charts import BLUE, PAPER, RED, chart, heading
from scmoe.probes.loads import (
    BALANCED,
    CurrentLoad,
    Sizes,
    check_load,
    imbalance,
    kinds_of,
    load_of,
)
from scmoe.report import Report, publish
from scmoe.report import say as tell
from scmoe.schedule.schedule import POSITIONS

BLOCKS = ("top2", "top1", "shared_expert", "pos1", "pos2", "pos3")
CHUNKS = (1, 2, 4)
OVERLAPPED = tuple(f"overlapped x {chunks}" for chunks in CHUNKS)
WAYS = ("sequential", *OVERLAPPED)
VOCABULARY = 1024
GENERATE_ROUNDS = 3  # a text without a cache takes seconds
SHAPES: tuple[Shape, ...] = ("prefill", "decode")
AUTO: dict[str, str] = {"prefill": "overlapped x 1", "decode": "sequential"}


@dataclass(frozen=True)
class Free:
    """Transfers that return their own rows at once, and numbers of rows as if all ranks had
    announced the same."""

    inner: AllToAllDispatcher

    def announce(self, counts_PE: Tensor) -> Any:
        ranks = self.inner.ep_size
        by_rank = counts_PE.expand(ranks, *counts_PE.shape).reshape(
            ranks, len(counts_PE), ranks, -1
        )
        return ReadByHost(Ready(None), by_rank, dist.get_rank(self.inner.group), None)

    def dispatch(self, rows_RD: Tensor, counts: Any) -> tuple[Pending, Receipt]:
        return self.inner.dispatch(rows_RD, counts)

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return self.inner.combine(rows_RD, receipt)


class InferenceBench:
    """Holds the models of one rank and runs passes. setting: its tokens are the prompt's, in one
    sequence."""

    def __init__(self, setting: Setting, batch: int) -> None:
        assert setting.compute == "real" and setting.tokens == setting.seq_len
        self.setting = setting
        context = build_context(dist.get_world_size(), CPU, timedelta(seconds=300))
        self.group = context.ep_group
        torch.manual_seed(0)
        self.models: dict[str, Any] = {}
        self.now = CurrentLoad(load_of(BALANCED))
        self.turns = Counter[
            tuple[Shape, Variant]
        ]()  # how often each one ran: the steps of its load
        for name in BLOCKS:
            blocks = make_blocks(name, setting, context, self.now)
            self.models[name] = GPT(VOCABULARY, setting.seq_len + 1, setting.dim, blocks).eval()
        self.paid = AllToAllDispatcher(self.group, setting.num_experts)
        self.free = Free(
            AllToAllDispatcher(self.group, setting.num_experts, exchange=emulated.free)
        )
        self.passes: dict[tuple[str, Shape], Any] = {}
        for shape, texts in zip(SHAPES, (1, batch), strict=True):
            ids_BS = torch.randint(VOCABULARY, (texts, setting.tokens))
            self.passes |= {
                (name, shape): a_pass(model, shape, ids_BS) for name, model in self.models.items()
            }

    def seconds(self, shape: Shape, variant: Variant) -> float:
        """Seconds of a pass. variant: its way is sequential, free, or overlapped x 2."""
        self.now.load, self.now.step = load_of(variant.load), self.turns[shape, variant]
        self.turns[shape, variant] += 1
        dispatcher: Any = self.free if variant.way == "free" else self.paid
        if variant.way == "sequential":
            dispatcher = Blocking(self.paid)
        self.models[variant.block].blocks[0].run_as(variant.schedule, dispatcher)
        return pass_seconds(self.passes[variant.block, shape], self.group, CPU, PASSES[shape])

    def ways(self, block: str, shape: Shape, load: str) -> list[Variant]:
        """Return all ways of a model in one shape at a load, at the best slots."""
        self.now.load, self.now.step = load_of(load), 0
        schedule = default_schedule(block)
        blocks = self.models[block].blocks
        run = self.passes[block, shape]
        blocks[0].run_as(schedule, self.paid)
        best = best_schedules(blocks, run, self.group, CPU, CHUNKS)
        overlapped = [
            Variant(block, best[chunks][0], f"overlapped x {chunks}", load) for chunks in CHUNKS
        ]
        return [
            *(Variant(block, schedule, way, load) for way in ("sequential", "free")),
            *overlapped,
        ]


def measure(rank: int, world_size: int, setting: Setting, batch: int) -> dict[str, dict[str, Any]]:
    """Run on every rank; the caller uses rank 0's result: for each load, of balance first, the
    rate, the plans, and seconds of each way by rounds."""
    dist.init_process_group("gloo")
    with torch.inference_mode():
        bench = InferenceBench(setting, batch)
        rate = (
            find_rate(setting, links.set_rate, partial(bench.seconds, "prefill"))
            if setting.shaped
            else None
        )
        loads = tuple(dict.fromkeys((BALANCED, *setting.loads)))
        runs: dict[tuple[Shape, Variant], Any] = {}
        for load in loads:
            for block in BLOCKS:
                say(f"planning {block}" + (f" at {load}" if setting.loads else ""))
                for shape in SHAPES:
                    runs |= {
                        (shape, variant): partial(bench.seconds, shape, variant)
                        for variant in bench.ways(block, shape, load)
                    }
        times = in_turn(runs, setting.rounds, over_ranks=True, say=say)
        results = {}
        for load in loads:
            of_load = {run: seconds for run, seconds in times.items() if run[1].load == load}
            results[load] = {"rate": rate, "times": of_load}
        return results


def bench_inference(
    share: float,
    prompt: int,
    batch: int,
    tokens: int,
    rounds: int,
    ranks: int,
    load: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """Measure, print a table, and write chart and figures into the folder `out`. Returns the
    report.

    share: of communication in a sequential top-2 prefill of `prompt` tokens a rank. batch: texts
    that a rank decodes. tokens: new ones of each generated text; 0: none is generated. load: of the
    experts, beside the balanced one, whose report then has one of each load in `loads`. The program
    starts again in a network namespace. ConfigError: an option that cannot be honoured.
    """
    require("bench inference", "matplotlib")
    check_ranks(ranks)
    experts = Setting.num_experts
    for option, number in (("prompt", prompt), ("batch", batch)):
        if number < experts or number % experts:
            allowed = f"multiples of {experts}, so that experts get equal shares"
            raise ConfigError(f"--{option} is {number}, allowed: {allowed}")
    loads = tuple(dict.fromkeys(load))
    setting = Setting(
        share,
        compute="real",
        rounds=rounds,
        tokens=prompt,
        seq_len=prompt,
        loads=loads,
        layout="dropless",
    )
    for uneven in map(load_of, loads):
        if uneven.kind == "ragged":
            raise ConfigError(
                f"--load is {uneven.name}, allowed: others, as prompts have equal lengths"
            )
        for top_k in {*map(setting.top_k_of, BLOCKS)}:
            check_load(uneven, Sizes(experts, top_k, ranks), setting.sequences)
    links.require()
    measured = run_ranks(measure, ranks, setting, batch, timeout_s=3600, own_links=True)[0]
    report = summary(setting, batch, ranks, measured[BALANCED])
    warn_of_share(share, report["comm_share"]["prefill"])
    if tokens:
        tell(f"generating {generation.TEXTS} texts of {tokens} tokens")
        alone = run_ranks(generation.measure, 1, tokens, GENERATE_ROUNDS, timeout_s=3600)[0]
        report["generate"] = alone.report()
    name = f"inference-{ranks}-ranks-share-{share:g}"
    if loads:
        report["loads"] = [at_load(setting, batch, ranks, measured, load) for load in loads]
        name = f"uneven-{name}{kinds_of(loads)}"
    publish(report, tables(report), draw, out / name)
    return report


def at_load(
    setting: Setting, batch: int, ranks: int, measured: dict[str, Any], load: str
) -> dict[str, Any]:
    """Return the report of a load: for each row and shape also the time of `auto`
    over its balanced one."""
    report = {"load": {"name": load}, **summary(setting, batch, ranks, measured[load])}
    even = summary(setting, batch, ranks, measured[BALANCED])
    times = {
        name: {(v.block, shape, v.way): s for (shape, v), s in measured[name]["times"].items()}
        for name in (load, BALANCED)
    }
    for block in BLOCKS:
        row = f"scmoe_{block}" if block in POSITIONS else block
        sizes = Sizes(setting.num_experts, setting.top_k_of(block), ranks)
        for shape, tokens in zip(SHAPES, (setting.tokens, batch), strict=True):
            uneven = imbalance(load_of(load), sizes, 1, tokens)
            cells = report["rows"][row][shape]
            balanced = even["rows"][row][shape]
            over = (
                times[load][block, shape, cells["auto"]]
                / times[BALANCED][block, shape, balanced["auto"]]
            )
            cells["over_balanced"] = median(over)
            cells["over_balanced_quartiles"] = quartiles(over)
            cells.update(uneven)
            cells["balanced"] = balanced["speedup"]
            if (block, shape) == (BLOCKS[0], SHAPES[0]):
                report["load"] |= uneven
    return report


def draw_loads(report: dict[str, Any], path: Path) -> None:
    """Draw the time of an overlapped prefill over the balanced one."""
    lines: dict[str, list[Point]] = {row: [] for row in report["rows"]}
    for at_load in sorted(report["loads"], key=heat_of):
        for row, both in at_load["rows"].items():
            prefill = both["prefill"]
            point = Point(
                prefill["max_over_mean_ranks"],
                prefill["over_balanced"],
                prefill["over_balanced_quartiles"],
            )
            lines[row].append(point)
    names = {row: name_of(row) for row in lines}
    share = f"communication share {report['comm_share']['prefill']:.2f}"
    words = (
        f"Uneven routing, prefill of {report['prompt']} tokens, real compute, {report['ranks']}"
        f" ranks, {share}"
    )
    draw_lines(lines, names, path, words, "prefill over its balanced one")


def summary(setting: Setting, batch: int, ranks: int, result: dict[str, Any]) -> dict[str, Any]:
    """Return the medians of the rounds, by row. result: what `measure` returned on rank 0 for one
    load."""
    times = {(v.block, shape, v.way): seconds for (shape, v), seconds in result["times"].items()}
    schedules = {(v.block, shape, v.way): v.schedule for shape, v in result["times"]}

    def shape_of(block: str, shape: str) -> dict[str, Any]:
        top2 = times["top2", shape, "sequential"]
        auto = AUTO[shape]
        ratios = {name: top2 / times[block, shape, name] for name in (*WAYS, "free")}
        return {
            "speedup": median(ratios[auto]),
            "quartiles": quartiles(ratios[auto]),
            "auto": auto,
            "ms": 1e3 * median(times[block, shape, auto]),
            "limit": median(ratios["free"]),
            "gain": median(times[block, shape, "sequential"] / times[block, shape, auto]),
            "ways": {name: median(ratios[name]) for name in WAYS},
            "slots": {name: schedules[block, shape, name].slot for name in OVERLAPPED},
            "inside_attention": {
                name: schedules[block, shape, name].inside_attention for name in OVERLAPPED
            },
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

    shares = {
        shape: median(1 - times["top2", shape, "free"] / times["top2", shape, "sequential"])
        for shape in SHAPES
    }
    return {
        "wanted_share": setting.share,
        "comm_share": shares,
        "link_mbit": result["rate"],
        "ranks": ranks,
        "prompt": setting.tokens,
        "batch": batch,
        "rounds": setting.rounds,
        "rows": {f"scmoe_{block}" if block in POSITIONS else block: row(block) for block in BLOCKS},
    }


def tables(report: dict[str, Any]) -> list[Report]:
    """Return a table for each shape, at balance and at each load, and those of the generation.

    Speed-ups are over sequential top-2 at that load.
    """
    reports = report, *report.get("loads", ())
    shapes = [table_of(each, shape) for each in reports for shape in SHAPES]
    return shapes + generation.tables(report["generate"]) if "generate" in report else shapes


def table_of(report: dict[str, Any], shape: Shape) -> Report:
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
    words = "{prompt} tokens a rank" if shape == "prefill" else "one token of {batch} texts a rank"
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
    rows = {
        name: row[shape] | {"tokens_per_s": row[f"{shape}_tokens_per_s"]}
        for name, row in report["rows"].items()
    }
    return Report(title, rows, columns)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw each row sequential and as planned, with its limit, for prefill and decode; with loads,
    as draw_loads."""
    if "loads" in report:
        return draw_loads(report, path)
    paper = PAPERS.get(report["wanted_share"])
    panels = {shape: bars(report, shape, paper if shape == "prefill" else None) for shape in SHAPES}
    lines = 3 if paper else 2
    with chart(path, 2.5 + height_of(panels["prefill"], lines)) as figure:
        for axis, (shape, groups) in zip(
            figure.subplots(1, 2, sharey=True), panels.items(), strict=True
        ):
            grouped_bars(axis, groups, lines=lines)
            tokens = (
                f"{report['prompt']} tokens" if shape == "prefill" else f"{report['batch']} texts"
            )
            share = 100 * report["comm_share"][shape]
            axis.set(title=f"{shape}, {tokens} a rank,\n{share:.0f} % communication")
            axis.set_xlabel("speed-up over\nsequential top-2")
        links = (
            f"links of {report['link_mbit']:.0f} Mbit/s between {report['ranks']} ranks on one CPU"
        )
        heading(figure, f"Inference, a pair of blocks, real compute, {links}")
        colors = {"sequential": RED, "as planned": BLUE} | ({paper.where: PAPER} if paper else {})
        quartiles = f"quartiles of {report['rounds']} rounds"
        bar_legend(figure, colors, quartiles, "limit: the same row without transfers", ncols=1)


def bars(report: dict[str, Any], shape: str, paper: Printed | None) -> dict[str, list[Bar]]:
    """Return the bars of each architecture: sequential, as planned, and the paper's inference."""
    groups = {}
    for row, both in report["rows"].items():
        cells = both[shape]
        sequential, planned = cells["ways"]["sequential"], cells["speedup"]
        group = [
            Bar(sequential, RED, f"{sequential:.2f}", limit=cells["limit"]),
            Bar(planned, BLUE, f"{planned:.2f}", cells["quartiles"], cells["limit"]),
        ]
        if paper and row in paper.rows:
            group.append(
                Bar(paper.rows[row]["forward"], PAPER, f"{paper.rows[row]['forward']:.2f}")
            )
        groups[name_of(row)] = group
    return groups
