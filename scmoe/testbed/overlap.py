"""What every rank does in `bench overlap`: one pair of blocks under every schedule, on links shaped to a communication
share.

    share of communication   s = 1 - T_free / T_sequential, forward, of a standard top-2 pair; hiding all of it gives
                             1 / (1 - s) at most
    rounds                   all variants in turn, then again; ratios are taken within a round
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from scmoe.moe.dispatcher import Blocking
from scmoe.parallel.dispatcher import AllToAllDispatcher
from scmoe.parallel.planner import Plan, Planner
from scmoe.parallel.shards import expert_parameters
from scmoe.schedule.cost import slots
from scmoe.schedule.schedule import Schedule
from scmoe.testbed import exchanges, links
from scmoe.testbed.pairs import ROWS, Setting, Stack, Step, make_block

SEARCH_ROUNDS = 15  # at each rate: at a share of 0.15, fewer are as uncertain as the transfers are long
TRIALS = 2  # of each schedule
NEAR, FINALISTS = 1.03, 3  # of a row, the schedules so near the best by trial go into the rounds, so many at most


@dataclass(frozen=True)
class Variant:
    """A block under a schedule. way: overlapped, sequential (transfers waited for at once) or free."""

    block: str
    schedule: Schedule
    way: str = "overlapped"


@dataclass(frozen=True)
class Seconds:
    """Of one round, this rank's until all ranks are asked for the slowest. cpu: processor time of the process."""

    forward: float
    train: float
    train_forward: float
    cpu_forward: float
    cpu_train: float

    @property
    def backward(self) -> float:
        return self.train - self.train_forward


class Bench:
    """All blocks of one rank, and the time of any variant of them."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, torch.device(setting.device)
        self.group = dist.new_group()
        torch.manual_seed(0)
        names = dict.fromkeys(["top2", *(ROWS[row][0] for row in setting.rows)])
        self.stacks = {
            n: [make_block(n, setting, self.group).to(self.device) for _ in range(setting.pairs)] for n in names
        }
        over_the_bus = exchanges.over_the_bus(self.device) if self.device.type == "cuda" else None
        paid = AllToAllDispatcher(self.group, setting.num_experts, exchange=over_the_bus)
        free = AllToAllDispatcher(self.group, setting.num_experts, exchange=exchanges.free)
        self.dispatchers = {"overlapped": paid, "sequential": Blocking(paid), "free": free}
        self.steps = {n: Step(stack, setting, self.group) for n, stack in self.stacks.items()}
        shape = setting.tokens // setting.seq_len, setting.seq_len, setting.dim
        self.x = torch.randn(shape, device=self.device, requires_grad=True)
        self.iterations = 0  # timed so far: an inference and a training step each

    def set(self, variant: Variant) -> Step:
        for block in self.stacks[variant.block]:
            block.schedule, block.moe.num_chunks = variant.schedule, variant.schedule.chunks  # type: ignore[union-attr, assignment]
            block.moe.dispatcher = self.dispatchers[variant.way]  # type: ignore[union-attr]
        return self.steps[variant.block]

    def now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def seconds(self, variant: Variant) -> Seconds:
        step = self.set(variant)
        dist.barrier()
        (t0, c0), _, (t1, c1) = self.now(), step.infer(self.x), self.now()
        dist.barrier()
        (t2, c2), y, (t3, _) = self.now(), step.forward(self.x), self.now()
        step.backward(y)
        t4, c4 = self.now()
        step.clear()
        self.x.grad = None
        self.iterations += 1
        return Seconds(t1 - t0, t4 - t2, t3 - t2, c1 - c0, c4 - c2)

    def forward_seconds(self, variants: Sequence[Variant], rounds: int) -> list[list[float]]:
        """Of each variant, by round; in turn. One round more than asked is run, the first to warm up."""
        times: list[list[float]] = [[] for _ in variants]
        for _ in range(rounds + 1):
            for variant, own in zip(variants, times, strict=True):
                step = self.set(variant)
                dist.barrier()
                start, _, end = self.now(), step.infer(self.x), self.now()
                own.append(end[0] - start[0])
        worst = iter(slowest([seconds for own in times for seconds in own[1:]]))
        return [list(itertools.islice(worst, rounds)) for _ in variants]

    def rounds(
        self, variants: Sequence[Variant], rounds: int, show: Callable[[str], None]
    ) -> dict[Variant, list[Seconds]]:
        """All variants in turn, then again."""
        times: dict[Variant, list[Seconds]] = {v: [] for v in variants}
        for i in range(rounds):
            show(f"round {i + 1} of {rounds}, {len(variants)} variants")
            for v in variants:
                times[v].append(self.seconds(v))
        fields = [asdict(s).values() for v in variants for s in times[v]]
        worst = slowest([value for row in fields for value in row])
        numbers = iter(worst)
        return {v: [Seconds(*itertools.islice(numbers, 5)) for _ in range(rounds)] for v in variants}

    def plan(self, block: str, chunk_counts: Sequence[int]) -> Plan:
        """The planner's choice, made from training steps as in a run."""
        step = self.set(Variant(block, Schedule(schedule_name(block))))
        planner = Planner(self.stacks[block], None, self.device, chunk_counts)
        while not planner.planned:
            planner.begin_step()
            step.backward(step.forward(self.x))
            step.clear()
            planner.end_step()
        assert planner.plans is not None
        return planner.plans[0]

    def gradient_mb(self, block: str) -> float:
        """Gradients that the ranks add up in an iteration: all but the experts'."""
        stack = Stack(self.stacks[block])
        shards = {name for name, _ in expert_parameters(stack)}
        return sum(p.numel() * p.element_size() for name, p in stack.named_parameters() if name not in shards) / 2**20

    def peak_mb(self, variant: Variant) -> float:
        """Most memory that a training step holds over what it finds."""
        step = self.set(variant)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            step.backward(step.forward(self.x))
            peak = torch.cuda.max_memory_allocated(self.device) - before
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
                step.backward(step.forward(self.x))
            peak = max(itertools.accumulate(allocated(recorded)))
        step.clear()
        return peak / 2**20


def allocated(recorded: profile) -> Iterator[int]:
    """Bytes taken and given back, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return (e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))


def slowest(values: Sequence[float]) -> list[float]:
    """Of all ranks."""
    worst = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


# ---------------------------------------------------------------------- the measurement


def measure(rank: int, world_size: int, setting: Setting, verbose: bool) -> dict[str, Any]:
    """Runs on every rank; rank 0's result counts. Seconds of each row's best schedules, of the planner's choice, and of
    each block sequential and free, round by round; planning and trying have warmed all of them up. The best of a row
    is the best by its rounds: a trial is too short to tell schedules apart that are near each other."""

    def show(line: str) -> None:
        if rank == 0 and verbose:
            print(line, file=sys.stderr, flush=True)

    dist.init_process_group("gloo")
    bench = Bench(setting)
    rate = find_rate(bench, show) if setting.shaped else None
    plans = {}
    rows = {row: ROWS[row] for row in setting.rows}
    for row, (block, chunk_counts) in rows.items():
        show(f"planning {row}")
        plans[row] = bench.plan(block, chunk_counts)
    candidates = {
        row: [Variant(block, schedule) for c in counts for schedule in slots(Schedule(schedule_name(block), 0, c))]
        for row, (block, counts) in rows.items()
    }
    everything = [variant for row in candidates.values() for variant in row]
    tried = bench.rounds(everything, TRIALS, lambda line: show(f"trying every schedule: {line}"))
    chosen = {row: Variant(rows[row][0], plan.schedule) for row, plan in plans.items()}
    finalists = {row: [*nearest(variants, tried), chosen[row]] for row, variants in candidates.items()}
    references = [Variant(b, Schedule(schedule_name(b)), way) for b in bench.stacks for way in ("sequential", "free")]
    measured = dict.fromkeys(itertools.chain(references, *finalists.values()))
    times = bench.rounds(list(measured), setting.rounds, show)
    best = {row: min(variants, key=lambda v: median(s.train for s in times[v])) for row, variants in finalists.items()}
    peaks = {row: bench.peak_mb(v) for row, v in best.items()}
    gradients = {block: bench.gradient_mb(block) for block in bench.stacks}
    return dict(
        **dict(rate=rate, plans=plans, best=best, chosen=chosen, times=times),
        **dict(peaks=peaks, gradients=gradients, iterations=bench.iterations),
    )


def nearest(variants: Sequence[Variant], tried: Mapping[Variant, Sequence[Seconds]]) -> list[Variant]:
    """The FINALISTS best by their training steps in the trial, of those that are NEAR the best."""
    seconds = {v: min(s.train for s in tried[v]) for v in variants}  # what disturbs a trial only makes it longer
    ranked = sorted(variants, key=lambda v: seconds[v])
    return [v for v in ranked[:FINALISTS] if seconds[v] <= NEAR * seconds[ranked[0]]]


def schedule_name(block: str) -> str:
    return "top_k" if block in ("top1", "top2") else block


def find_rate(bench: Bench, show: Callable[[str], None]) -> float:
    """Sets the links' rate, in Mbit/s: the one given, or that at which the wanted share of a sequential top-2 pair is
    communication."""
    s, wanted = bench.setting, bench.setting.share
    if s.link_mbit is not None:
        links.set_rate(s.link_mbit)
        return s.link_mbit
    pair = [Variant("top2", Schedule("top_k"), way) for way in ("sequential", "free")]
    t_free = median(bench.forward_seconds(pair[1:], SEARCH_ROUNDS)[0])
    sent_bits = 2 * 2 * s.pairs * s.tokens * s.dim * 32 * (1 - 1 / dist.get_world_size())
    rate = sent_bits / (t_free * wanted / (1 - wanted)) / 1e6
    for _ in range(8):
        links.set_rate(rate)
        rounds = zip(*bench.forward_seconds(pair, SEARCH_ROUNDS), strict=True)
        share = median(1 - t_free / t_sequential for t_sequential, t_free in rounds)
        show(f"links at {rate:.0f} Mbit/s: communication share {share:.3f}, wanted {wanted:g}")
        if abs(share - wanted) < 0.01:
            break
        factor = share / (1 - share) / (wanted / (1 - wanted))
        rate *= min(2.0, max(0.5, factor))  # a disturbed measurement must not stop the link
    else:
        links.set_rate(rate)
    return rate
