"""The measurement of `figure 13`: latency and memory of a language model with resident and with
offloaded experts.

    variants    resident, blocking, determinate, speculative: models that share all weights but the
                experts'
    rate        the cache is memory and the store is a file in the page cache, read at a bounded
                rate: that at which blocking makes the MoE block of ScMoE Pos-2, one token, longer
                by a given share
    rounds      all variants in turn, on the same tokens. A time is kept if the process had its
                cores: its threads waited for one during at most `max_wait` of it (schedstat). A
                round is made again on its tokens until every variant has a kept time, since other
                tokens may need more experts
    memory      anonymous memory of the process beyond what it holds without experts and slots

One torch thread, so that the thread that reads has a core. A token is computed alone: no cached
keys and values.
"""

import copy
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from experiments.bench.offload.cases import RESIDENT, Case, Memory, Offloading, Way
from experiments.bench.other_settings import OffloadSetting
from experiments.bench.pairs import BLOCK_TOP_K, ROWS, WIRING_OF
from experiments.engine.profiles import anonymous_mb, peak_mb
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.inference.offload.cache import Cache, FileReader
from scmoe.inference.offload.migration import WAYS, offload_experts
from scmoe.inference.offload.store import expert_layers, write_store
from scmoe.moe.recorder import Recorder
from scmoe.planning.clock import CPU, median, undisturbed
from scmoe.training.assembly.model import build_model

Operators = dict[str, list[float]]  # the seconds of each execution of a block's operators
RATE_TRIALS = 2  # of a rate


@dataclass
class Times:
    """The kept times of one case by variant, in seconds, and what was counted. All variants have
    the times of the same tokens."""

    seconds: dict[str, list[float]]
    operators: list[Operators] = field(default_factory=list)  # of each resident block
    hit_rate: dict[str, float] = field(default_factory=dict)
    active: list[float] = field(default_factory=list)  # experts that had rows: a layer's mean
    tried: int = 0
    equal_bits: bool = True

    @property
    def kept(self) -> int:
        """Return the number of kept times of each variant."""
        return len(self.active)


def measure(
    setting: OffloadSetting, architecture: str, rates: tuple[float, ...] | None
) -> Offloading:
    """Return the figures of one architecture. rates: in MB/s; None: those that give the setting's
    costs. It requires a process of its own, because memory that was freed before is not seen when
    it is used again."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(setting, architecture)
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="scmoe-offload-") as folder, torch.inference_mode():
        path = Path(folder, "experts.safetensors")
        write_store(path, model)
        with ExitStack() as closing:
            variants = {RESIDENT: model} | {way: sharing(model) for way in WAYS}
            caches = [
                closing.enter_context(offload_experts(variants[way], path, way=way)) for way in WAYS
            ]
            if rates is None:
                rates = tuple(
                    find_fetch_rate(variants, caches, cost, setting) for cost in setting.costs
                )
            for rate in rates:
                set_rate(caches, rate)
                for tokens in setting.tokens:
                    times = rounds(variants, caches, tokens, setting)
                    case = Case(tokens, rate, times.kept, times.tried, times.equal_bits)
                    cases.append(with_figures(case, times, model, setting))
        memory = peaks(model, path, max(setting.tokens))
    return Offloading(tuple(cases), memory, rates)


def set_rate(caches: list[Cache], rate_mb_s: float) -> None:
    for cache in caches:
        assert isinstance(cache.source, FileReader)
        cache.source.rate_mb_s = rate_mb_s


def find_fetch_rate(
    variants: dict[str, nn.Module], caches: list[Cache], cost: float, setting: OffloadSetting
) -> float:
    """Return the rate at which blocking makes a block longer by `cost` of its time.

    That is more than the time of the fetch: a thread must start, and the fetch evicts other data
    from the processor's caches.
    """
    two = {name: variants[name] for name in (RESIDENT, "blocking")}
    fetch_s = 0.0
    few = replace(setting, rounds=min(9, setting.rounds))
    for _ in range(1 + RATE_TRIALS):
        times = rounds(two, caches, min(setting.tokens), few)
        if not times.kept:
            raise ConfigError(
                f"the process had to wait for a core in each round of {setting.limit_s:g} s."
                " Measure with other work stopped, or give more seconds as --limit-s"
            )
        resident_s, blocking_s = (median(seconds) for seconds in times.seconds.values())
        wanted_s = cost * block_and_window(times.operators, variants[RESIDENT])[0]
        extra_s = (blocking_s - resident_s) / setting.pairs if fetch_s else wanted_s
        fetch_s = max(wanted_s / 2, (fetch_s or wanted_s) + wanted_s - extra_s)
        set_rate(caches, setting.expert_mb / fetch_s)
    return setting.expert_mb / fetch_s


def build(setting: OffloadSetting, architecture: str) -> nn.Module:
    s = setting
    model = (f"layers={2 * s.pairs}", f"dim={s.dim}", f"heads={s.heads}", f"ffn_dim={s.ffn_dim}")
    data = ("data.name=synthetic", "data.vocab_size=256", f"data.seq_len={max(*s.tokens, 8)}")
    block, _ = ROWS[2][architecture]
    moe = (
        f"moe.num_experts={s.num_experts}",
        f"moe.top_k={BLOCK_TOP_K.get(block, 1)}",
        "moe.capacity_factor=null",
    )
    config = load_config(
        None, [*(f"model.{size}" for size in model), *data, *moe, *WIRING_OF[block].overrides]
    )
    return build_model(config).eval()


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def rounds(
    variants: dict[str, nn.Module], caches: list[Cache], tokens: int, setting: OffloadSetting
) -> Times:
    """Run all variants in turn until enough times of each are kept, or the time is over. Tokens on
    which a variant has no kept time then are left out."""
    times, deadline = Times({name: [] for name in variants}), time.monotonic() + setting.limit_s
    for variant in variants.values():
        variant(torch.randint(256, (1, tokens)))  # to warm up
    for cache in caches:
        cache.needed = cache.hits = 0
    ids = torch.randint(256, (1, tokens))
    kept: dict[str, float] = {}  # on these tokens
    operators: list[Operators] = []
    while times.kept < setting.rounds and (time.monotonic() < deadline or not times.tried):
        logits: dict[str, Tensor] = {}
        for name, variant in variants.items():
            out, seconds = undisturbed(partial(variant, ids), setting.max_wait)
            logits[name] = out.logits_BSV
            if seconds is not None:
                kept[name] = seconds
        recorded, seconds = undisturbed(
            partial(in_place, variants[RESIDENT], ids), setting.max_wait
        )
        if seconds is not None:
            operators = recorded
        times.equal_bits &= all(torch.equal(y, logits[RESIDENT]) for y in logits.values())
        times.tried += 1
        if operators and kept.keys() == variants.keys():
            for name, seconds in kept.items():
                times.seconds[name].append(seconds)
            times.operators += operators
            times.active.append(fmean(int((stats.counts_E > 0).sum()) for stats in out.stats))
            ids = torch.randint(256, (1, tokens))
            kept, operators = {}, []
    times.hit_rate = {way: cache.hit_rate for way, cache in zip(WAYS, caches, strict=True)}
    return times


def with_figures(case: Case, times: Times, model: nn.Module, setting: OffloadSetting) -> Case:
    """Return a case with the figures of its times; as it is, if no time was kept.

    The latency of an offloaded MoE block is that of a resident one plus the model's extra time per
    MoE block. A fetch can be hidden by the window and, if several experts are fetched, by the
    computation of all of them but the last."""
    if not times.kept:
        return case
    block_s, window_s = block_and_window(times.operators, model)
    active = median(times.active)
    fetch_s = active * setting.expert_mb / case.rate_mb_s
    experts_s = median(sum(block["experts"]) for block in times.operators) * (1 - 1 / active)
    taken = {name: median(seconds) for name, seconds in times.seconds.items()}
    extra = {name: (s - taken[RESIDENT]) / setting.pairs for name, s in taken.items()}
    windows = {"determinate": window_s, "speculative": taken[RESIDENT] / setting.pairs}
    ways = {RESIDENT: Way(1e3 * block_s)}
    for way in WAYS:
        bound = 0.0
        if way in windows:
            bound = most_hidden(fetch_s, windows[way] + experts_s, extra["blocking"])
        hidden = 1 - extra[way] / extra["blocking"]
        ways[way] = Way(1e3 * (block_s + extra[way]), hidden, bound, times.hit_rate[way])
    return replace(
        case,
        ways=ways,
        block_ms=1e3 * block_s,
        window_ms=1e3 * window_s,
        fetch_ms=1e3 * fetch_s,
        active=active,
        blocking_costs=extra["blocking"] / block_s,
    )


def most_hidden(fetch_s: float, computing_s: float, blocking_s: float) -> float:
    """Return the largest share of blocking's extra time that a way can take away: all but the part
    of a fetch that is longer than the computation beside it. Blocking costs more than a fetch."""
    exposed_s = max(0.0, fetch_s - computing_s)
    return max(0.0, 1 - exposed_s / blocking_s)


def in_place(model: nn.Module, ids: Tensor) -> list[Operators]:
    """Run the resident model and return the operators of each block. Alone they would be faster,
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


def peaks(model: nn.Module, path: Path, tokens: int) -> Memory:
    """Return the memory of each way. The model loses its experts."""
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
    return Memory(weights, {way: mb - fixed for way, mb in peaks_mb.items()})
