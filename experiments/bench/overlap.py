"""The measurement of `bench overlap` on one rank: a row of blocks under every schedule, on links
whose rate gives a share of communication.

    share of communication   s = 1 - T_free / T_sequential, forward, of a standard top-2 row; hiding
                             all communication speeds the row up by 1 / (1 - s) at most
    rounds                   all variants in turn, then again; ratios are taken within a round
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.bench import emulated
from experiments.bench.pairs import ROWS, Setting, default_schedule, share_sent
from experiments.bench.stacks import (
    Variant,
    chosen_by,
    make_blocks,
    make_step,
    of_each_kind,
    rows_of_layout,
)
from experiments.bench.two_batches import batches_of
from experiments.engine import links
from experiments.engine.clock import CPU, in_turn, median, slowest
from experiments.engine.profiles import peak_bytes
from scmoe.models.halves import in_flight
from scmoe.models.residual_stream import through
from scmoe.moe.dispatcher import Blocking, Dispatcher
from scmoe.moe.layout import Buffers
from scmoe.moe.operators import Recorder
from scmoe.parallel.mesh import build_context
from scmoe.parallel.update.step import Step
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher
from scmoe.planning.planner import Planner
from scmoe.planning.pricing import LayerChoice
from scmoe.probes.loads import BALANCED, CurrentLoad, load_of, sequences_of
from scmoe.report import say as tell
from scmoe.schedule.cost import TRANSFERS, OperatorTimes, slots

# at each rate; with fewer, the error at a share of 0.15 is as large as the transfers are long
SEARCH_ROUNDS = 15
MAX_FACTOR_FROM_ESTIMATE = 8.0  # of a searched rate
MAX_FACTOR_FROM_LAST_ROUND = 2.0
TRIALS = 3  # of each schedule
FAR_FROM_SHARE = 0.05  # of communication: what is measured from what was asked for
# up to FINALISTS schedules of a row go into the rounds: those NEAR the best in the trials
NEAR = 1.03
FINALISTS = 3


class Seconds(NamedTuple):
    """The times of a variant: this rank's in one round, or arrays over rounds, of the slowest rank
    in each.

    cpu: processor time of the process. train_forward, update: parts of `train`, the first of all
    batches of a step.
    """

    forward: Any
    train: Any
    train_forward: Any
    cpu_forward: Any
    cpu_train: Any
    update: Any = 0.0

    @property
    def backward(self) -> Any:
        return self.train - self.train_forward


class Bench:
    """Holds all blocks of one rank, and measures variants of them."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, torch.device(setting.device)
        ranks, timeout = dist.get_world_size(), timedelta(seconds=300)
        context = build_context(ranks, CPU, timeout)
        torch.manual_seed(0)
        names = dict.fromkeys(["top2", *map(setting.block_of, setting.rows)])
        dtype = getattr(torch, setting.dtype)
        self.current = CurrentLoad(load_of(BALANCED))
        self.stacks = {
            n: [
                block.to(self.device, dtype)
                for block in make_blocks(n, setting, context, self.current)
            ]
            for n in names
        }
        buffered = isinstance(rows_of_layout(setting), Buffers)
        self.dispatcher = partial(
            AllToAllDispatcher, context.ep_group, setting.num_experts, buffered=buffered
        )
        self.paid = self.dispatcher(exchange=context.carried())
        if setting.bus:
            self.set_rate(1.0)
        self.free = self.dispatcher(exchange=emulated.free)
        self.steps = {n: make_step(stack, setting, context) for n, stack in self.stacks.items()}
        self.inputs = {}
        for load in dict.fromkeys((BALANCED, *setting.loads)):
            sequences = sequences_of(load_of(load), setting.sequences, ranks)[dist.get_rank()]
            shape = sequences, setting.seq_len, setting.dim
            self.inputs[load] = torch.randn(
                shape, device=self.device, dtype=dtype, requires_grad=True
            )
        self.iterations = 0  # timed so far: an inference and a training step each
        # how often each variant ran in these rounds: the steps of its load
        self.turns: Counter[Variant] = Counter()

    def set_rate(self, rate: float) -> None:
        """Set the rate at which this rank sends: in Mbit/s, or as a multiple of its bus's.

        Every rank must call it.
        """
        if self.setting.bus:
            self.paid = self.dispatcher(exchange=emulated.over_the_bus(self.device, rate))
        else:
            links.set_rate(rate)
            dist.barrier()

    def set(self, variant: Variant, recorder: Recorder | None = None) -> Step:
        """Make the blocks run as the variant says. recorder: notes operators, and transfers that
        overlap."""
        dispatcher: Dispatcher = self.free
        if variant.way == "overlapped":
            dispatcher = self.paid if recorder is None else self.paid.recorded_by(recorder)
        elif variant.way == "sequential":
            # a transfer that is waited for at once is an operator like any other
            dispatcher = Blocking(self.paid)
        self.current.load, self.current.step = load_of(variant.load), self.turns[variant]
        blocks = self.stacks[variant.block]
        for block, schedule in zip(
            blocks, variant.of_blocks(block.schedule for block in blocks), strict=True
        ):
            block.run_as(schedule, dispatcher, recorder)
        step = self.steps[variant.block]
        stack: Any = step.model
        stack.batches_in_flight = variant.batches_in_flight
        return step

    @property
    def x(self) -> Tensor:
        """Return this rank's input of a block, at the current load."""
        return self.inputs[self.current.load.name]

    def time(self) -> tuple[float, float]:
        """Return wall-clock and processor time in seconds, after the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def infer(self, variant: Variant) -> float:
        """Return the wall-clock seconds of a forward pass without gradients."""
        return self.forward(variant)[0]

    @torch.no_grad()
    def forward(self, variant: Variant) -> tuple[float, float]:
        """Return the wall-clock and processor seconds of a forward pass without gradients."""
        step = self.set(variant)
        dist.barrier()
        t0, c0 = self.time()
        step.model(self.x)
        t1, c1 = self.time()
        return t1 - t0, c1 - c0

    def seconds(self, variant: Variant) -> Seconds:
        """Return the times of a forward pass and then of a training step."""
        forward, cpu_forward = self.forward(variant)
        step = self.steps[variant.block]
        dist.barrier()
        t0, c0 = self.time()
        in_forward = 0.0
        for batch in range(1, self.setting.accumulate + 1):
            keeps = batch < self.setting.accumulate or variant.way == "alone"
            with step.wrapped.no_sync() if keeps else nullcontext():
                begin, _ = self.time()
                y = step.model(self.x)
                in_forward += self.time()[0] - begin
                step.backward(y, torch.ones_like(y))
        t2, _ = self.time()
        step.update()
        t3, c3 = self.time()
        step.model.zero_grad()
        self.x.grad = None
        self.iterations += 1
        self.turns[variant] += 1
        return Seconds(forward, t3 - t0, in_forward, cpu_forward, c3 - c0, t3 - t2)

    def rounds(
        self, variants: Iterable[Variant], rounds: int, what: str = ""
    ) -> dict[Variant, Seconds]:
        """Run all variants in turn, `rounds` times. A load that changes with the steps makes one
        in each round."""
        self.turns.clear()
        runs = {variant: partial(self.seconds, variant) for variant in variants}
        times = in_turn(runs, rounds, warm_up=0, over_ranks=True, say=lambda line: say(what + line))
        return {variant: Seconds(*seconds) for variant, seconds in times.items()}

    def choose(
        self,
        block: str,
        chunk_counts: Sequence[int],
        load: str = BALANCED,
        numbers_in_flight: Sequence[int] = (1,),
    ) -> list[LayerChoice]:
        """Return the planner's choice for each block, made from training steps as in a run."""
        step = self.set(Variant(block, default_schedule(block), load=load))
        batches = self.setting.accumulate
        planner = Planner(self.stacks[block], None, self.device, chunk_counts, batches=batches)
        planner.choose_in_flight(step.model, numbers_in_flight)
        while not planner.has_chosen:
            for batch in range(1, batches + 1):
                planner.begin_step()
                with step.wrapped.no_sync() if batch < batches else nullcontext():
                    y = step.model(self.x)
                    step.backward(y, torch.ones_like(y))
                if batch == batches:
                    step.update()
                    step.zero_grad()
                planner.end_step()
            self.current.step += 1
        return planner.choices

    def gradients(self, block: str) -> list[tuple[float, int]]:
        """Return (ready, bytes) of each gradient that is summed over ranks (all but the experts').
        ready: when it is computed, as a share of the time of backward without transfers."""
        step = self.set(Variant(block, default_schedule(block), "alone"))
        ready: dict[nn.Parameter, float] = {}

        def note(p: nn.Parameter) -> None:
            ready[p] = self.time()[0]

        hooks = [
            p.register_post_accumulate_grad_hook(note)
            for p in step.parameters
            if p not in step.shards
        ]
        with step.wrapped.no_sync():
            y, start = step.model(self.x), self.time()[0]
            step.backward(y, torch.ones_like(y))
        backward_s = self.time()[0] - start
        for hook in hooks:
            hook.remove()
        step.model.zero_grad()
        return [((ready_s - start) / backward_s, p.nbytes) for p, ready_s in ready.items()]

    def peak_mb(self, variant: Variant) -> float:
        """Return the peak memory of a training step in MiB, of the rank that has the most."""
        peaks = [
            peak_bytes(self.device, partial(step.train, self.x)) for step in self.steps_of(variant)
        ]
        return float(slowest(max(peaks) / 2**20))

    @torch.no_grad()
    def dropped(self, variant: Variant) -> float:
        """Return the share of the routed copies of all ranks that the layout drops."""
        blocks = self.stacks[variant.block]
        counts = torch.zeros(2, dtype=torch.float64)
        for _ in self.steps_of(variant):
            first = partial(through, blocks[:1])
            (stats,) = in_flight(variant.batches_in_flight, first, self.x, None)[1]
            counts += torch.stack([stats.num_dropped, stats.counts_E.sum()]).double().cpu()
        dist.all_reduce(counts)
        return float(counts[0] / counts[1])

    def steps_of(self, variant: Variant) -> Iterator[Step]:
        """Make the blocks run as the variant says, with each routing that its load makes in the
        rounds."""
        load = load_of(variant.load)
        for turn in range(
            min(self.setting.rounds, load.period * load.phases(dist.get_world_size()))
        ):
            self.turns[variant] = turn
            yield self.set(variant)


def say(line: str) -> None:
    """Print a line of progress, on one rank."""
    if dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)


class Row(NamedTuple):
    """One row at one load. choices: the planner's. chosen: its variant. finalists: the variants of
    the rounds, with the best one. peak_mb: memory of a step. dropped: share of copies; None where
    no uneven load is measured.
    """

    choices: Sequence[LayerChoice]
    chosen: Variant
    finalists: Sequence[Variant]
    best: Variant
    peak_mb: float
    dropped: float | None = None


class Measured(NamedTuple):
    """What was measured at one load. rate: Bench.set_rate's, None without one. times: of each
    variant, of all loads. gradients: by block (Bench.gradients). iterations: timed in all."""

    rate: float | None
    rows: Mapping[str, Row]
    times: Mapping[Variant, Seconds]
    gradients: Mapping[str, Sequence[tuple[float, int]]]
    iterations: int
    load: str = BALANCED


def way_of(measured: Measured, block: str, way: str, load: str | None = None) -> Seconds:
    """Return the times of a block's default schedule. load: None: that of `measured`."""
    return measured.times[Variant(block, default_schedule(block), way, load or measured.load)]


def measure(rank: int, world_size: int, setting: Setting) -> dict[str, Measured]:
    """Run on every rank; the caller uses rank 0's result. Returns what was measured at each load,
    of balance first.

    Measures, round by round, the best schedules of each row, the planner's choice, and each block
    sequential and free. Planning and trials warm all of them up. The best of a row is the best by
    its rounds, because a trial is too short to separate schedules with similar times."""
    dist.init_process_group("gloo")
    bench = Bench(setting)
    rate = (
        find_rate(setting, bench.set_rate, bench.infer) if setting.shaped or setting.bus else None
    )
    choices: dict[tuple[str, str], list[LayerChoice]] = {}
    chosen: dict[tuple[str, str], Variant] = {}
    candidates: dict[tuple[str, str], list[Variant]] = {}
    for load, row in product(bench.inputs, setting.rows):
        say(f"planning {row}" + (f" at {load}" if setting.loads else ""))
        block, counts = ROWS[setting.every][row]
        batches = batches_of(row)
        choices[load, row] = bench.choose(block, counts, load, (batches,))
        chosen[load, row] = chosen_by(choices[load, row], block, load)
        schedules = [s for c in counts for s in slots(replace(default_schedule(block), chunks=c))]
        candidates[load, row] = [
            Variant(block, schedule, load=load, batches_in_flight=batches) for schedule in schedules
        ]
    tried = bench.rounds(chain(*candidates.values()), TRIALS, "trying every schedule: ")
    finalists = {}
    for name, variants in candidates.items():
        best_of_each = [nearest(kind, tried)[0] for kind in of_each_kind(variants)]
        finalists[name] = [*nearest(variants, tried), chosen[name], *best_of_each]
    ways = (
        ("sequential", "free", "alone") if setting.level == "iteration" else ("sequential", "free")
    )
    blocks = [(block, default_schedule(block)) for block in bench.stacks]
    references = [
        Variant(*block, way, load) for load in bench.inputs for block in blocks for way in ways
    ]
    if rate is not None:  # the machine's speed has drifted since the search
        planned = rate
        rate = find_rate(setting, bench.set_rate, bench.infer, planned)
        choices = {
            name: [with_transfers(choice, planned / rate) for choice in of_row]
            for name, of_row in choices.items()
        }
    times = bench.rounds(chain(references, *finalists.values()), setting.rounds)
    rows: dict[str, dict[str, Row]] = {load: {} for load in bench.inputs}
    for (load, row), variants in finalists.items():
        best = min(variants, key=lambda v: median(times[v].train))
        dropped = bench.dropped(best) if setting.loads else None
        rows[load][row] = Row(
            choices[load, row], chosen[load, row], variants, best, bench.peak_mb(best), dropped
        )
    gradients = {block: bench.gradients(block) for block in bench.stacks}
    return {
        load: Measured(rate, rows_of_load, times, gradients, bench.iterations, load)
        for load, rows_of_load in rows.items()
    }


def with_transfers(choice: LayerChoice, factor: float) -> LayerChoice:
    """Return a choice whose transfers take `factor` times as long."""

    def longer(times: Mapping[str, float]) -> dict[str, float]:
        return {op: factor * t if op in TRANSFERS else t for op, t in times.items()}

    times = {
        chunks: OperatorTimes(longer(operators.forward), longer(operators.backward))
        for chunks, operators in choice.times.items()
    }
    return replace(choice, times=times)


def nearest(variants: Sequence[Variant], tried: Mapping[Variant, Seconds]) -> list[Variant]:
    """Return the variants whose steps were NEAR the best in the trials, FINALISTS at most."""
    seconds = {v: min(tried[v].train) for v in variants}  # a disturbance only makes a trial longer
    ranked = sorted(variants, key=lambda v: seconds[v])
    return [v for v in ranked[:FINALISTS] if seconds[v] <= NEAR * seconds[ranked[0]]]


def warn_of_share(wanted: float | None, measured: float) -> None:
    """Warn if the measured share of communication is far from the one that was searched for."""
    if wanted is not None and abs(measured - wanted) > FAR_FROM_SHARE:
        tell(
            f"warning: the communication share is {measured:.2f}, but {wanted:g} was asked for. The"
            f" result is that of {measured:.2f}. Measure again with other work stopped, or give"
            " other sizes."
        )


def find_rate(
    s: Setting,
    set_rate: Callable[[float], None],
    infer: Callable[[Variant], float],
    start: float | None = None,
) -> float:
    """Set the rate (Bench.set_rate) and returns it: the given one, or the one at which
    communication is the wanted share of sequential top-2. infer: returns the seconds of a forward
    pass of top-2. start: begins there.
    """
    if s.link_mbit is not None:
        set_rate(s.link_mbit)
        return s.link_mbit
    sequential, free = (
        Variant("top2", default_schedule("top2"), way) for way in ("sequential", "free")
    )
    runs = {variant: partial(infer, variant) for variant in (sequential, free)}
    wanted, rate = s.share, 1.0 if start is None else start
    if start is None and not s.bus:
        t_free = median(in_turn({free: runs[free]}, SEARCH_ROUNDS, over_ranks=True)[free])
        sent_bits = 2 * 2 * s.moe_blocks * s.tokens * s.dim * 32 * share_sent(dist.get_world_size())
        rate = sent_bits / (t_free * wanted / (1 - wanted)) / 1e6
    # transfers below the links' burst take no time at any rate, so a search of theirs would stray
    widest = MAX_FACTOR_FROM_ESTIMATE if start is None else MAX_FACTOR_FROM_LAST_ROUND
    least, most = (0.0, math.inf) if s.bus else (rate / widest, rate * widest)
    for _ in range(8):
        set_rate(rate)
        times = in_turn(runs, SEARCH_ROUNDS, over_ranks=True)
        share = median(1 - times[free] / times[sequential])
        where = f"bus at {rate:.3g} of its rate" if s.bus else f"links at {rate:.0f} Mbit/s"
        say(f"{where}: communication share {share:.3f}, wanted {wanted:g}")
        if abs(share - wanted) < 0.01:
            break
        factor = share / (1 - share) / (wanted / (1 - wanted))
        rate *= min(2.0, max(0.5, factor))  # a disturbed measurement must not stop the link
        rate = min(most, max(least, rate))
    else:
        set_rate(rate)
    return rate
