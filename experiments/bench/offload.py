"""`figure 13`: latency and memory of a language model with resident and with offloaded experts.

    variants    resident, blocking, determinate, speculative: models that share all weights but the
                experts'
    rate        the cache is memory and the store is a file in the page cache, read at a bounded
                rate: that at which blocking makes the MoE block of ScMoE Pos-2, one token, longer
                by a given share
    rounds      all variants in turn, with new tokens in each. A time is kept if the process had its
                cores: its threads waited for one during at most `max_wait` of it (schedstat)
    memory      anonymous memory of the process beyond what it holds without experts and slots

One torch thread, so that the thread that reads has a core. A token is computed alone: no cached
keys and values.
"""

import copy
import signal
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench.pairs import ROWS, TOP_K, WIRINGS
from experiments.bench.speed_chart import name_of
from experiments.engine.bars import Bar, bar_legend, grouped_bars, height_of
from experiments.engine.clock import CPU, median, undisturbed
from experiments.engine.isolated import follow_caller
from experiments.engine.profiles import anonymous_mb, peak_mb
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.extras import require
from scmoe.config.load import load
from scmoe.inference.offload.cache import Cache, FileReader
from scmoe.inference.offload.migration import WAYS, offload_experts
from scmoe.inference.offload.store import expert_layers, write_store
from scmoe.moe.operators import Recorder
from scmoe.parallel.mesh import ParallelContext
from scmoe.probes.charts import BLUE, PAPER, RED, SKY, chart, heading, title
from scmoe.report import Report, publish
from scmoe.training.assembly.model import build_model

ARCHITECTURES = (
    "scmoe_pos2",
    "scmoe_pos1",
    "scmoe_pos3",
    "shared_expert",
    "top2",
)  # the first one gives the rates
RESIDENT = "resident"
Operators = dict[str, list[float]]  # the seconds of each execution of a block's operators
TRIALS = 2  # of a rate
# Blocking's extra latency over an MoE block's; the share of it that migration hides; the share of
# peak memory saved
PAPERS = {"GPT2-MoE-Medium": (0.8, 0.75, 0.5), "GPT3-MoE-XL": (2.4, 0.25, 0.6)}
COLORS = {"blocking": RED, "determinate": BLUE, "speculative": SKY}


@dataclass(frozen=True)
class Setting:
    """costs: of blocking, one token, over the resident MoE block; each gives a rate. tokens: of a
    forward pass. rounds: to keep of each case, in at most limit_s seconds."""

    dim: int = 1024
    ffn_dim: int = 4096
    heads: int = 16
    num_experts: int = 8
    pairs: int = 4
    tokens: tuple[int, ...] = (1, 4, 64)
    costs: tuple[float, ...] = (0.8, 2.4)
    rounds: int = 15
    limit_s: float = 10.0
    max_wait: float = 0.03
    architectures: tuple[str, ...] = ARCHITECTURES

    @property
    def expert_mb(self) -> float:
        return 2 * self.dim * self.ffn_dim * 4 / 1e6


QUICK = Setting(
    dim=64,
    ffn_dim=128,
    heads=2,
    pairs=2,
    tokens=(1, 8),
    rounds=2,
    limit_s=2.0,
    max_wait=float("inf"),
)


@dataclass
class Times:
    """Of one case: the kept times by variant, in seconds, and what was counted."""

    seconds: dict[str, list[float]]
    operators: list[Operators] = field(default_factory=list)  # of each resident block
    hit_rate: dict[str, float] = field(default_factory=dict)
    active: list[float] = field(default_factory=list)  # experts that had rows, per layer
    tried: int = 0
    equal_bits: bool = True

    @property
    def kept(self) -> int:
        """Return the number of kept times of the variant that has the fewest."""
        return min(len(seconds) for seconds in self.seconds.values()) if self.operators else 0


def measure(setting: Setting, architecture: str, rates: tuple[float, ...] | None) -> dict[str, Any]:
    """Return the figures of one architecture. rates: in MB/s; None: those that give the setting's
    costs. It requires a process of its own, because memory that was freed before is not seen when
    it is used again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, cases = build(setting, architecture), []
    with tempfile.TemporaryDirectory(prefix="scmoe-offload-") as folder, torch.inference_mode():
        path = Path(folder, "experts.safetensors")
        write_store(path, model)
        with ExitStack() as closing:
            variants = {RESIDENT: model} | {way: sharing(model) for way in WAYS}
            caches = [
                closing.enter_context(offload_experts(variants[way], path, way=way)) for way in WAYS
            ]
            if rates is None:
                rates = tuple(find_rate(variants, caches, cost, setting) for cost in setting.costs)
            for rate in rates:
                set_rate(caches, rate)
                for tokens in setting.tokens:
                    times = rounds(variants, caches, tokens, setting)
                    cases.append({"tokens": tokens, **figures(times, model, setting, rate)})
        memory = peaks(model, path, max(setting.tokens))
    return {"cases": cases, "memory": memory, "rates": rates}


def set_rate(caches: list[Cache], rate_mb_s: float) -> None:
    for cache in caches:
        assert isinstance(cache.source, FileReader)
        cache.source.rate_mb_s = rate_mb_s


def find_rate(
    variants: dict[str, nn.Module], caches: list[Cache], cost: float, setting: Setting
) -> float:
    """Return the rate at which blocking makes a block longer by `cost` of its time. More than the
    fetch counts: the thread's start, and what the fetch drives out of the processor's caches."""
    two, fetch_s = {name: variants[name] for name in (RESIDENT, "blocking")}, 0.0
    few = replace(setting, rounds=min(9, setting.rounds))
    for _ in range(1 + TRIALS):
        times = rounds(two, caches, min(setting.tokens), few)
        if not times.kept:
            raise RuntimeError(
                f"the process had no core in {setting.limit_s:g} s: measure on a quieter machine"
            )
        resident_s, blocking_s = (median(seconds) for seconds in times.seconds.values())
        wanted_s = cost * block_and_window(times.operators, variants[RESIDENT])[0]
        extra_s = (blocking_s - resident_s) / setting.pairs if fetch_s else wanted_s
        fetch_s = max(wanted_s / 2, (fetch_s or wanted_s) + wanted_s - extra_s)
        set_rate(caches, setting.expert_mb / fetch_s)
    return setting.expert_mb / fetch_s


def build(setting: Setting, architecture: str) -> nn.Module:
    s = setting
    model = (f"layers={2 * s.pairs}", f"dim={s.dim}", f"heads={s.heads}", f"ffn_dim={s.ffn_dim}")
    data = ("data.name=synthetic", "data.vocab_size=256", f"data.seq_len={max(*s.tokens, 8)}")
    block, _ = ROWS[2][architecture]
    moe = (
        f"moe.num_experts={s.num_experts}",
        f"moe.top_k={TOP_K.get(block, 1)}",
        "moe.capacity_factor=null",
    )
    config = load(None, [*(f"model.{size}" for size in model), *data, *moe, *WIRINGS[block]])
    return build_model(config, ParallelContext()).eval()


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def rounds(
    variants: dict[str, nn.Module], caches: list[Cache], tokens: int, setting: Setting
) -> Times:
    """Run all variants in turn until enough times of each are kept, or the time is over."""
    times, deadline = Times({name: [] for name in variants}), time.monotonic() + setting.limit_s
    for variant in variants.values():
        variant(torch.randint(256, (1, tokens)))  # to warm up
    for cache in caches:
        cache.needed = cache.hits = 0
    while times.kept < setting.rounds and (time.monotonic() < deadline or not times.tried):
        ids = torch.randint(256, (1, tokens))
        logits: dict[str, Tensor] = {}
        for name, variant in variants.items():
            out, seconds = undisturbed(partial(variant, ids), setting.max_wait)
            logits[name] = out.logits_BSV
            if seconds is not None:
                times.seconds[name].append(seconds)
        operators, seconds = undisturbed(
            partial(in_place, variants[RESIDENT], ids), setting.max_wait
        )
        if seconds is not None:
            times.operators += operators
        times.active += [float((stats.counts_E > 0).sum()) for stats in out.stats]
        times.equal_bits &= all(torch.equal(y, logits[RESIDENT]) for y in logits.values())
        times.tried += 1
    times.hit_rate = {way: cache.hit_rate for way, cache in zip(WAYS, caches, strict=True)}
    return times


def figures(times: Times, model: nn.Module, setting: Setting, rate: float) -> dict[str, Any]:
    """Return the figures of one case; no ways if nothing was kept.

    The latency of an offloaded MoE block is that of a resident one plus the model's extra time per
    MoE block. bound: the largest share of a fetch that can be hidden. The window hides it and, if
    several experts are fetched, the computation of all of them but the last."""
    case = {
        "rate_mb_s": rate,
        "kept": times.kept,
        "tried": times.tried,
        "equal_bits": times.equal_bits,
        "ways": {},
    }
    if not times.kept:
        return case
    block_s, window_s = block_and_window(times.operators, model)
    active = sum(times.active) / len(times.active)
    fetch_s = active * setting.expert_mb / rate
    experts_s = median(sum(block["experts"]) for block in times.operators) * (1 - 1 / active)
    taken = {name: median(seconds) for name, seconds in times.seconds.items()}
    extra = {name: (s - taken[RESIDENT]) / setting.pairs for name, s in taken.items()}
    windows = {"determinate": window_s, "speculative": taken[RESIDENT] / setting.pairs}
    ways: dict[str, Any] = {
        RESIDENT: {"latency_ms": 1e3 * block_s, "hidden": None, "bound": None, "hit_rate": None}
    }
    for way in WAYS:
        bound = min(1.0, (windows[way] + experts_s) / fetch_s) if way in windows else 0.0
        hidden, hit_rate = 1 - extra[way] / extra["blocking"], times.hit_rate[way]
        ways[way] = dict(
            latency_ms=1e3 * (block_s + extra[way]), hidden=hidden, bound=bound, hit_rate=hit_rate
        )
    ms = {"block_ms": 1e3 * block_s, "window_ms": 1e3 * window_s, "fetch_ms": 1e3 * fetch_s}
    return {
        **case,
        **ms,
        "active": active,
        "blocking_costs": extra["blocking"] / block_s,
        "ways": ways,
    }


def in_place(model: nn.Module, ids: Tensor) -> list[Operators]:
    """Run the resident model and returns the operators of each block. Alone they would be faster,
    with their weights in the processor's caches."""
    blocks = moe_blocks_of(model)
    operators_of: list[Operators] = []
    recorders = [Recorder(CPU) for _ in blocks]
    for block, recorder in zip(blocks, recorders, strict=True):
        block.run_as(block.schedule, block.moe.dispatcher, recorder)
    model(ids)
    for block, recorder in zip(blocks, recorders, strict=True):
        block.run_as(block.schedule, block.moe.dispatcher)
        operators: Operators = defaultdict(list)
        for span in recorder.spans("forward"):
            operators[span.operator].append(span.end - span.start)
        operators_of.append(operators)
    return operators_of


def block_and_window(operators: list[Operators], model: nn.Module) -> tuple[float, float]:
    """Return the seconds of a resident MoE block (its attention, MoE module and shared expert),
    and of the backbone's operators between gate and experts: medians."""
    window = moe_blocks_of(model)[0].schedule.window
    block, between = [], []
    for times_of in operators:
        *_, last_attention = times_of["attention"]
        block.append(
            last_attention
            + sum(sum(s) for name, s in times_of.items() if name not in ("attention", "mlp"))
        )
        # of several executions of an operator, the last ones are in the window
        between.append(sum(sum(times_of[name][-window.count(name) :]) for name in set(window)))
    return median(block), median(between)


def peaks(model: nn.Module, path: Path, tokens: int) -> dict[str, Any]:
    """Return the peak of each way in MB beyond the fixed weights, and these. The model loses its
    experts."""
    batches = [torch.randint(256, (1, t)) for t in (1, 1, tokens)]
    peaks_mb = {RESIDENT: peak_mb(model, batches)}
    for experts in expert_layers(model).values():
        experts.to(device="meta")
    fixed = anonymous_mb()
    for way in WAYS:
        variant = sharing(model)
        with offload_experts(variant, path, way=way):
            peaks_mb[way] = peak_mb(variant, batches)
        del variant
    weights = sum(p.nbytes for p in model.parameters() if not p.is_meta) / 1e6
    return {"fixed_mb": weights, "peak_mb": {way: mb - fixed for way, mb in peaks_mb.items()}}


def bench_offload(out: Path, setting: Setting) -> dict[str, Any]:
    """Measure every architecture, print tables, write chart and figures into `out`; return the rows
    of one token."""
    require("figure 13", "matplotlib")
    report, rates = dict[str, Any](), None
    for architecture in sorted(setting.architectures, key=ARCHITECTURES.index):
        print(f"measuring {name_of(architecture)}", file=sys.stderr)
        ends = (partial(signal.raise_signal, signal.SIGKILL),)
        with ProcessPoolExecutor(1, get_context("spawn"), follow_caller, ends) as alone:
            report[architecture] = alone.submit(measure, setting, architecture, rates).result()
        rates = report[architecture]["rates"]
    equal_bits = all(case["equal_bits"] for each in report.values() for case in each["cases"])
    summary = {"rows": rows_of(report), "equal_bits": equal_bits}
    figure = {**summary, "setting": asdict(setting), "architectures": report}
    publish(figure, tables(figure), draw, out / "figure-13")
    print(f"equal bits: {equal_bits}", file=sys.stderr)
    return summary


def rows_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return {architecture: {way: figures}} of the first case, which has the fewest tokens and the
    lowest cost."""
    figure = {}
    for architecture, measured in report.items():
        case, peaks = measured["cases"][0], measured["memory"]["peak_mb"]
        same = {"tokens": case["tokens"], "rate_mb_s": case["rate_mb_s"]}
        figure[architecture] = {
            w: {**f, "peak_mb": peaks[w], **same} for w, f in case["ways"].items()
        }
    return figure


def tables(figure: dict[str, Any]) -> list[Report]:
    latencies, memory = {}, {}
    for name, measured in figure["architectures"].items():
        memory[name] = measured["memory"]
        for case in measured["cases"]:
            latencies[f"{name}, {case['tokens']}, {case['rate_mb_s']:,.0f}"] = case
    columns = {
        "window, ms": "{window_ms:.1f}",
        "fetch, ms": "{fetch_ms:.1f}",
        **{f"{way}, ms": f"{{ways[{way}][latency_ms]:.1f}}" for way in (RESIDENT, *COLORS)},
        "determinate takes away": "{ways[determinate][hidden]:.0%}",
        "limit": "{ways[determinate][bound]:.0%}",
        "speculative": "{ways[speculative][hidden]:.0%}",
        "hit rate": "{ways[speculative][hit_rate]:.0%}",
        "times kept": "{kept} of {tried}",
    }
    peaks = {way: f"{{peak_mb[{way}]:.0f}}" for way in (RESIDENT, *COLORS)}
    title = (
        "Latency of the MoE block, width {dim}, {ffn_dim} in an expert, {num_experts} experts,"
        " {pairs} MoE layers, one thread; a time is kept if the process waited for a core during at"
        " most {max_wait:.0%} of it; medians:"
    ).format_map(figure["setting"])
    return [
        Report(title, latencies, columns, "row, tokens, MB/s"),
        Report(
            "Peak memory beyond the fixed weights, MB:",
            memory,
            {"fixed weights": "{fixed_mb:.0f}", **peaks},
        ),
    ]


def draw(figure: dict[str, Any], path: Path) -> None:
    """Draw a panel for each rate, latency over that of resident experts, and one for the memory."""
    report, tokens = figure["architectures"], min(figure["setting"]["tokens"])
    rates = next(iter(report.values()))["rates"]
    panels = {}
    for rate, model in zip(rates, PAPERS, strict=False):
        words = (
            f"MoE block, {tokens} token{'s' if tokens > 1 else ''}, experts fetched at"
            f" {rate / 1e3:.1f} GB/s"
        )
        panels[f"{words}:\n% longer than with resident experts"] = latency_bars(report, rate, model)
    panels["Peak memory, fixed weights and experts or slots:\n% of that with resident experts"] = (
        memory_bars(report)
    )
    heights = [height_of(groups) for groups in panels.values()]
    with chart(path, 0.9 + 0.8 * len(panels) + sum(heights)) as drawing:
        axes = drawing.subplots(len(heights), 1, height_ratios=heights)
        for axis, (words, groups) in zip(axes, panels.items(), strict=True):
            grouped_bars(axis, groups, room=0.22)
            title(axis, words)
        heading(drawing, "Fig. 13: experts fetched while the backbone runs, on one CPU")
        bar_legend(drawing, COLORS | {"paper (its machine)": PAPER})


def latency_bars(report: dict[str, Any], rate: float, model: str) -> dict[str, list[Bar]]:
    """Return how much longer a block takes at this rate, in %, and the paper's model for which the
    rate stands."""
    cost, hidden, _ = PAPERS[model]
    printed = {"blocking": cost, "determinate": cost * (1 - hidden)}
    groups = {model: [percent(share, PAPER, f" {way}") for way, share in printed.items()]}
    for architecture, measured in report.items():
        case = next(case for case in measured["cases"] if case["rate_mb_s"] == rate)
        if ways := case["ways"]:  # else no time was kept
            over = {
                way: ways[way]["latency_ms"] / ways[RESIDENT]["latency_ms"] - 1 for way in COLORS
            }
            groups[name_of(architecture)] = [
                percent(share, COLORS[way]) for way, share in over.items()
            ]
    return groups


def memory_bars(report: dict[str, Any]) -> dict[str, list[Bar]]:
    """Return all weights on the device and the activations, as a share of that with resident
    experts."""
    groups = {model: [percent(1 - less, PAPER)] for model, (_, _, less) in PAPERS.items()}
    for architecture, measured in report.items():
        fixed, peaks = measured["memory"]["fixed_mb"], measured["memory"]["peak_mb"]
        share = (fixed + peaks["determinate"]) / (fixed + peaks[RESIDENT])
        groups[name_of(architecture)] = [percent(share, COLORS["determinate"])]
    return groups


def percent(share: float, color: str, words: str = "") -> Bar:
    return Bar(100 * share, color, f"{100 * share:.0f}{words}")
