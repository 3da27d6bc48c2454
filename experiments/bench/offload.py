"""The measurement of `fig13`: a language model whose experts are resident or offloaded, in every way (Fig. 13).

    variants    resident, blocking, determinate, speculative: models that share all weights but the experts'
    rate        the cache is memory and the store is a file in the page cache, read at a bounded rate: that at which
                blocking makes the MoE block of ScMoE Pos-2, one token, longer by a given share
    rounds      all variants in turn, with new tokens in each. A time is kept if the process had its cores: its threads
                waited for one during at most `max_wait` of it (schedstat)
    memory      anonymous memory of the process beyond what it holds without experts and slots

One torch thread, so that the thread that reads has a core. A token is computed alone: no cached keys and values.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.load import load
from scmoe.experiments.engine.process import anonymous_mb, peak_mb, waited_s
from scmoe.inference.offload.cache import Cache, FileReader
from scmoe.inference.offload.migration import WAYS, attach
from scmoe.inference.offload.store import Store, expert_layers, write_store
from scmoe.moe.operators import Recorder
from scmoe.parallel.mesh import ParallelContext
from scmoe.schedule.play import Span
from scmoe.training.assembly.model import build_model

ARCHITECTURES = {  # in the order of measuring: the first one gives the rates
    "scmoe_pos2": ("moe.architecture=scmoe", "moe.position=pos2"),
    "scmoe_pos1": ("moe.architecture=scmoe", "moe.position=pos1"),
    "scmoe_pos3": ("moe.architecture=scmoe", "moe.position=pos3"),
    "shared_expert": ("moe.architecture=shared_expert",),
    "top2": ("moe.architecture=top_k", "moe.top_k=2"),
}
RESIDENT = "resident"
TRIALS = 2  # of a rate


@dataclass(frozen=True)
class Setting:
    """costs: of blocking, one token, over the resident MoE block; each gives a rate. tokens: of a forward pass. rounds:
    to keep of each case, in at most limit_s seconds."""

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
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)

    @property
    def expert_mb(self) -> float:
        return 2 * self.dim * self.ffn_dim * 4 / 1e6


@dataclass
class Times:
    """Of one case: the kept times by variant, in seconds, and what was counted."""

    seconds: dict[str, list[float]]
    operators: list[list[Span]] = field(default_factory=list)  # of each resident block
    hit_rate: dict[str, float] = field(default_factory=dict)
    active: list[float] = field(default_factory=list)  # experts that had rows, per layer
    tried: int = 0
    equal_bits: bool = True

    @property
    def kept(self) -> int:
        """Number of kept times of the variant that has the fewest."""
        return min(len(own) for own in self.seconds.values()) if self.operators else 0


def measure(setting: Setting, architecture: str, rates: tuple[float, ...] | None) -> dict[str, Any]:
    """Returns the figures of one architecture. rates: in MB/s; None: those that give the setting's costs. It requires a
    process of its own, because memory that was freed before is not seen when it is used again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, cases = build(setting, architecture), []
    with tempfile.TemporaryDirectory(prefix="scmoe-offload-") as folder, torch.inference_mode():
        path = Path(folder, "experts.safetensors")
        write_store(path, model)
        with offloaded(model, path) as (variants, caches):
            if rates is None:
                rates = tuple(find_rate(variants, caches, cost, setting) for cost in setting.costs)
            for rate in rates:
                set_rate(caches, rate)
                for tokens in setting.tokens:
                    times = rounds(variants, caches, tokens, setting)
                    cases.append({"tokens": tokens, **figures(times, model, setting, rate)})
        memory = peaks(model, path, max(setting.tokens), setting)
    return {"cases": cases, "memory": memory, "rates": rates}


def set_rate(caches: dict[str, Cache], rate_mb_s: float) -> None:
    for cache in caches.values():
        assert isinstance(cache.source, FileReader)
        cache.source.rate_mb_s = rate_mb_s


def find_rate(variants: dict[str, nn.Module], caches: dict[str, Cache], cost: float, setting: Setting) -> float:
    """Returns the rate at which blocking makes a block longer by `cost` of its time. More than the fetch counts: the
    thread's start, and what the fetch drives out of the processor's caches."""
    two, fetch_s = {name: variants[name] for name in (RESIDENT, "blocking")}, 0.0
    few = replace(setting, rounds=min(9, setting.rounds))
    for _ in range(1 + TRIALS):
        times = rounds(two, caches, min(setting.tokens), few)
        if not times.kept:
            raise RuntimeError(f"the process had no core in {setting.limit_s:g} s: measure on a quieter machine")
        resident_s, blocking_s = (median(own) for own in times.seconds.values())
        wanted_s = cost * block_and_window(times.operators, variants[RESIDENT])[0]
        extra_s = (blocking_s - resident_s) / setting.pairs if fetch_s else wanted_s
        fetch_s = max(wanted_s / 2, (fetch_s or wanted_s) + wanted_s - extra_s)
        set_rate(caches, setting.expert_mb / fetch_s)
    return setting.expert_mb / fetch_s


def build(setting: Setting, architecture: str) -> nn.Module:
    s = setting
    sizes = (
        f"model.layers={2 * s.pairs}",
        f"model.dim={s.dim}",
        f"model.heads={s.heads}",
        f"model.ffn_dim={s.ffn_dim}",
    )
    data = ("data.name=synthetic", "data.vocab_size=256", f"data.seq_len={max(*s.tokens, 8)}")
    moe = (f"moe.num_experts={s.num_experts}", "moe.capacity_factor=null")
    return build_model(load(None, [*sizes, *data, *moe, *ARCHITECTURES[architecture]]), ParallelContext()).eval()


@contextmanager
def offloaded(model: nn.Module, path: Path) -> Iterator[tuple[dict[str, nn.Module], dict[str, Cache]]]:
    """Yields the model, under its name, and a copy for each way that shares all weights but the experts', with its
    cache."""
    variants, caches = {RESIDENT: model}, dict[str, Cache]()
    try:
        for way in WAYS:
            variants[way] = sharing(model)
            caches[way] = attach(variants[way], Store(path, variants[way]), way=way)
        yield variants, caches
    finally:
        for cache in caches.values():
            cache.close()


def sharing(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def rounds(variants: dict[str, nn.Module], caches: dict[str, Cache], tokens: int, setting: Setting) -> Times:
    """Runs all variants in turn until enough times of each are kept, or the time is over."""
    times, deadline = Times({name: [] for name in variants}), time.monotonic() + setting.limit_s
    for variant in variants.values():
        variant(torch.randint(256, (1, tokens)))  # to warm up
    for cache in caches.values():
        cache.needed = cache.hits = 0
    while times.kept < setting.rounds and (time.monotonic() < deadline or not times.tried):
        ids, logits = torch.randint(256, (1, tokens)), dict[str, Tensor]()
        for name, variant in variants.items():
            waited, begin = waited_s(), time.perf_counter()
            out = variant(ids)
            seconds = time.perf_counter() - begin
            if waited_s() - waited <= setting.max_wait * seconds:
                times.seconds[name].append(seconds)
            logits[name] = out.logits_BSV
        waited, begin = waited_s(), time.perf_counter()
        operators = in_place(variants[RESIDENT], ids)
        if waited_s() - waited <= setting.max_wait * (time.perf_counter() - begin):
            times.operators += operators
        times.active += [float((stats.counts_E > 0).sum()) for stats in out.stats]
        times.equal_bits &= all(torch.equal(y, logits[RESIDENT]) for y in logits.values())
        times.tried += 1
    times.hit_rate = {name: cache.hit_rate for name, cache in caches.items()}
    return times


def figures(times: Times, model: nn.Module, setting: Setting, rate: float) -> dict[str, Any]:
    """Returns the figures of one case; no ways if nothing was kept.

    The latency of an offloaded MoE block is that of a resident one plus the model's extra time per MoE block. bound:
    the largest share of a fetch that can be hidden. The window hides it and, if several experts are fetched, the
    computation of all of them but the last."""
    case = {"rate_mb_s": rate, "kept": times.kept, "tried": times.tried, "equal_bits": times.equal_bits, "ways": {}}
    if not times.kept:
        return case
    block_s, window_s = block_and_window(times.operators, model)
    active = sum(times.active) / len(times.active)
    fetch_s = active * setting.expert_mb / rate
    experts_s = median(duration(spans, "experts") for spans in times.operators) * (1 - 1 / active)
    middle = {name: median(own) for name, own in times.seconds.items()}
    extra = {name: (s - middle[RESIDENT]) / setting.pairs for name, s in middle.items()}
    windows = {"determinate": window_s, "speculative": middle[RESIDENT] / setting.pairs}
    ways: dict[str, Any] = {RESIDENT: {"latency_ms": 1e3 * block_s, "hidden": None, "bound": None, "hit_rate": None}}
    for way in WAYS:
        bound = min(1.0, (windows[way] + experts_s) / fetch_s) if way in windows else 0.0
        hidden, hit_rate = 1 - extra[way] / extra["blocking"], times.hit_rate[way]
        ways[way] = dict(latency_ms=1e3 * (block_s + extra[way]), hidden=hidden, bound=bound, hit_rate=hit_rate)
    ms = {"block_ms": 1e3 * block_s, "window_ms": 1e3 * window_s, "fetch_ms": 1e3 * fetch_s}
    return {**case, **ms, "active": active, "blocking_costs": extra["blocking"] / block_s, "ways": ways}


def in_place(model: nn.Module, ids: Tensor) -> list[list[Span]]:
    """Runs the resident model and returns the operators of each block. Alone they would be faster, with their weights
    in the processor's caches."""
    recorders = [Recorder(torch.device("cpu")) for _ in moe_blocks_of(model)]
    for block, recorder in zip(moe_blocks_of(model), recorders, strict=True):
        block.run_as(block.schedule, block.moe.dispatcher, recorder)
    model(ids)
    for block in moe_blocks_of(model):
        block.run_as(block.schedule, block.moe.dispatcher)
    return [recorder.spans("forward") for recorder in recorders]


def block_and_window(operators: list[list[Span]], model: nn.Module) -> tuple[float, float]:
    """Returns the seconds of a resident MoE block (its attention, MoE module and shared expert), and of the backbone's
    operators between gate and experts: medians."""
    window = moe_blocks_of(model)[0].schedule.window
    block, between = [], []
    for spans in operators:
        attentions = [span.end - span.start for span in spans if span.operator == "attention"]
        others = {name: duration(spans, name) for name in {span.operator for span in spans} - {"attention"}}
        block.append(attentions[-1] + sum(s for name, s in others.items() if name != "mlp"))
        of_window = sum(others[name] for name in window if name != "attention")
        between.append(of_window + sum(attentions[len(attentions) - window.count("attention") :]))
    return median(block), median(between)


def duration(spans: list[Span], operator: str) -> float:
    return sum(span.end - span.start for span in spans if span.operator == operator)


def peaks(model: nn.Module, path: Path, tokens: int, setting: Setting) -> dict[str, Any]:
    """Returns the peak of each way in MB beyond the fixed weights, and these. The model loses its experts."""
    batches = [torch.randint(256, (1, t)) for t in (1, 1, tokens)]
    found = {RESIDENT: peak_mb(model, batches)}
    for experts in expert_layers(model).values():
        experts.to(device="meta")
    fixed = anonymous_mb()
    for way in WAYS:
        variant = sharing(model)
        with attach(variant, Store(path, variant), way=way) as cache:
            found[way] = peak_mb(variant, batches)
        del variant, cache
    weights = sum(p.nbytes for p in model.parameters() if not p.is_meta) / 1e6
    return {"fixed_mb": weights, "peak_mb": {way: mb - fixed for way, mb in found.items()}}
