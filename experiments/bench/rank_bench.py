"""One rank of the benches of blocks: it holds the blocks of every row, makes them run as a variant
says, and times them.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.bench import emulated
from experiments.bench.pairs import default_schedule
from experiments.bench.setting import Setting
from experiments.bench.stacks import Stack, Variant, make_blocks, make_step, rows_of_layout
from experiments.engine import links
from experiments.engine.profiles import peak_bytes
from experiments.engine.ranks import say_once
from experiments.engine.step import Step
from scmoe.loads import BALANCED, CurrentLoad, load_of, rank_sequences
from scmoe.models.residual_stream import run_blocks
from scmoe.models.run_as import run_as, schedule_of
from scmoe.moe.dispatcher import Blocking, Dispatcher
from scmoe.moe.layout import Buffers
from scmoe.moe.recorder import Recorder
from scmoe.parallel.mesh import build_mesh
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher
from scmoe.parallel.wire.wire import Wire
from scmoe.planning.choice import ModelChoice
from scmoe.planning.clock import CPU, in_turn, slowest
from scmoe.planning.planner import Planner


class VariantTimes(NamedTuple):
    """The times of a variant: this rank's in one round, or arrays over rounds, of the slowest rank
    in each.

    cpu_forward: processor time of the process. train_forward, update: parts of `train`, the first
    of all batches of a step.
    """

    forward: Any
    train: Any
    train_forward: Any
    cpu_forward: Any
    update: Any = 0.0

    @property
    def backward(self) -> Any:
        return self.train - self.train_forward


class Bench:
    """Holds all blocks of one rank, and measures variants of them."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, torch.device(setting.device)
        ranks, timeout = dist.get_world_size(), timedelta(seconds=300)
        wire = Wire(build_mesh(ranks, CPU, timeout))
        torch.manual_seed(0)
        names = dict.fromkeys(["top2", *map(setting.block_of, setting.rows)])
        dtype = getattr(torch, setting.dtype)
        self.current = CurrentLoad(load_of(BALANCED))
        self.stacks = {
            n: [
                block.to(self.device, dtype)
                for block in make_blocks(n, setting, wire, self.current)
            ]
            for n in names
        }
        buffered = isinstance(rows_of_layout(setting), Buffers)
        self.dispatcher = partial(
            AllToAllDispatcher, wire.mesh.ep_group, setting.num_experts, buffered=buffered
        )
        self.paid = self.dispatcher()
        if setting.links == "bus":
            self.set_rate(1.0)
        self.free = self.dispatcher(exchange=emulated.free)
        self.models = {n: Stack(blocks) for n, blocks in self.stacks.items()}
        self.steps = {n: make_step(model, setting, wire) for n, model in self.models.items()}
        self.inputs = {}
        for load in dict.fromkeys((BALANCED, *setting.loads)):
            sequences = rank_sequences(load_of(load), setting.sequences, ranks)[dist.get_rank()]
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
        if self.setting.links == "bus":
            self.paid = self.dispatcher(exchange=emulated.over_the_bus(self.device, rate))
        else:
            links.set_rate(rate)
            dist.barrier()

    def set(self, variant: Variant, recorder: Recorder | None = None) -> Step:
        """Make the blocks run as the variant says. recorder: notes operators, and transfers that
        overlap."""
        dispatcher: Dispatcher = self.free
        if variant.transfers == "overlapped":
            dispatcher = self.paid if recorder is None else self.paid.recorded_by(recorder)
        elif variant.transfers == "sequential":
            # a transfer that is waited for right after its start is an operator like any other
            dispatcher = Blocking(self.paid)
        self.current.load, self.current.step = load_of(variant.load), self.turns[variant]
        model = self.models[variant.block]
        blocks = len(model.blocks)
        schedule = variant.model_schedule(schedule_of(model))
        run_as(model, schedule, [dispatcher] * blocks, [recorder] * blocks)
        return self.steps[variant.block]

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

    def seconds(self, variant: Variant) -> VariantTimes:
        """Return the times of a forward pass and then of a training step."""
        forward, cpu_forward = self.forward(variant)
        step = self.steps[variant.block]
        dist.barrier()
        t0, _ = self.time()
        in_forward = 0.0
        for batch in range(1, self.setting.accumulate + 1):
            keeps = batch < self.setting.accumulate or variant.transfers == "alone"
            with step.wrapped.no_sync() if keeps else nullcontext():
                begin, _ = self.time()
                y = step.model(self.x)
                in_forward += self.time()[0] - begin
                step.backward(y, torch.ones_like(y))
        t2, _ = self.time()
        step.update()
        t3, _ = self.time()
        step.model.zero_grad()
        self.x.grad = None
        self.iterations += 1
        self.turns[variant] += 1
        return VariantTimes(forward, t3 - t0, in_forward, cpu_forward, t3 - t2)

    def rounds(
        self, variants: Iterable[Variant], rounds: int, what: str = ""
    ) -> dict[Variant, VariantTimes]:
        """Run all variants in turn, `rounds` times. A load that changes with the steps makes one
        in each round."""
        self.turns.clear()
        runs = {variant: partial(self.seconds, variant) for variant in variants}
        times = in_turn(
            runs, rounds, warm_up=0, over_ranks=True, say=lambda line: say_once(what + line)
        )
        return {variant: VariantTimes(*seconds) for variant, seconds in times.items()}

    def choose(
        self,
        block: str,
        chunk_counts: Sequence[int],
        load: str = BALANCED,
        numbers_in_flight: Sequence[int] = (1,),
    ) -> ModelChoice:
        """Return the planner's choice for the blocks, made from training steps as in a run."""
        step = self.set(Variant(block, default_schedule(block), load=load))
        batches = self.setting.accumulate
        planner = Planner(
            self.models[block],
            None,
            self.device,
            chunk_counts,
            batches=batches,
            numbers_in_flight=numbers_in_flight,
        )
        if self.setting.tries is not None:
            planner.most_tries = self.setting.tries
        while planner.choice is None:
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
        return planner.choice

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
            first = partial(run_blocks, blocks[:1])
            (stats,) = self.models[variant.block].halves(first, self.x, None)[1]
            counts += torch.stack([stats.num_dropped, stats.counts_E.sum()]).double().cpu()
        dist.all_reduce(counts)
        return float(counts[0] / counts[1])

    def steps_of(self, variant: Variant) -> Iterator[Step]:
        """Make the blocks run as the variant says, with each routing that its load makes in the
        rounds."""
        load = load_of(variant.load)
        routings = load.period * load.phases(dist.get_world_size())
        for turn in range(min(self.setting.rounds, routings)):
            self.turns[variant] = turn
            yield self.set(variant)
