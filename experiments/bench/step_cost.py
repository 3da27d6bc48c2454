"""What a training step costs: with dense weights that are split, and with the guard against NaN and
Inf.

A step is forward, backward, clipping and AdamW of a configured model on random tokens, on one
thread of each rank. Variants run in turn, and ratios are taken within a round.

`bench dense`, dense weights that are replicated (DDP), or split over all ranks or a node's (FSDP2).
The ranks are joined by the loopback device, or by links of the rate at which the transfers of a
sequential top-2 pair of this size are a share of its forward time. `at_once` is sharded as FSDP
does it on gloo: it waits for each gather and each sum.

    link    time in which a rank's link carries what it sends in a step: rows, gathers, scatters,
            sums

`bench guard`, one process with the guard's hooks and its check (fault 27), and without. It holds
for this processor: on a GPU the guard's small reductions cost kernel launches, which this does not
measure.
"""

import re
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench.overlap import Bench, find_rate
from experiments.bench.pairs import pair_of
from experiments.engine.clock import CPU, in_turn, middle, seconds
from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.parallel.dense import with_dense_mesh
from scmoe.parallel.mesh import ParallelContext, build_context
from scmoe.parallel.update.guard import Guard, clip_grad_norm
from scmoe.parallel.update.step import Step
from scmoe.parallel.update.wrap import wrap
from scmoe.training.assembly.model import build_model

WARM_UP, GUARD_ROUNDS = 2, 15
SIZE = (
    "data.name=synthetic",
    "data.seq_len=128",
    "data.vocab_size=4096",
    "model.layers=4",
    "model.dim=256",
)


def dense_cost(
    rank: int,
    world_size: int,
    ep_size: int,
    batch: int,
    rounds: int,
    share: float | None,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Runs on every rank; the caller uses rank 0's result: medians. hybrid has two nodes. batch:
    sequences of a rank. share: of communication, on links of the rank's own; None: loopback.
    overrides: key=value, over SIZE.
    """
    dist.init_process_group("gloo")
    config, timeout = load(None, [*SIZE, *overrides]), timedelta(seconds=600)
    mbit = None
    if share is not None:
        pair = pair_of(config, share, batch * config.data.seq_len)
        bench = Bench(pair)
        mbit = find_rate(pair, bench.set_rate, bench.infer)
    context = build_context(ep_size, CPU, timeout)
    sharded = with_dense_mesh(context, "sharded", world_size // 2, CPU, timeout)
    steps = {
        "replicated": Training(context, batch, config),
        "sharded": Training(sharded, batch, config),
        "at_once": Training(sharded, batch, config, hidden=False),
    }
    if world_size > 3:
        hybrid = with_dense_mesh(context, "hybrid", world_size // 2, CPU, timeout)
        steps["hybrid"] = Training(hybrid, batch, config)
    times = in_turn(steps, rounds, WARM_UP)
    report: dict[str, Any] = {} if mbit is None else {"link_mbit": mbit}
    for way, (wall, processor, sent) in times.items():
        report[way] = {
            "ms": 1e3 * middle(wall),
            "time_ratio": middle(wall / times["replicated"][0]),
            "processor_ratio": middle(processor / times["replicated"][1]),
            "states_mib": steps[way].states_bytes / 2**20,
        }
        if mbit is not None:
            report[way]["link_ms"] = 1e3 * middle(sent) * 8 / (mbit * 1e6)
    return report


class Training:
    """A model with its optimizer, on this rank. Calling it takes a step. hidden: gathers and sums,
    as in a run."""

    def __init__(
        self, context: ParallelContext, batch: int, config: Config, hidden: bool = True
    ) -> None:
        model = build_model(config, context)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.step = Step(wrap(model, context, hidden=hidden), context, optimizer, clip=1.0)
        self.ids = torch.randint(config.data.vocab_size, (batch, config.data.seq_len + 1))
        self.states_bytes = 0  # with the gradients of the last step

    def __call__(self) -> tuple[float, float, float]:
        """Return wall-clock and processor seconds, and bytes that this rank has sent to its link,
        if it has one."""
        dist.barrier()
        sent, wall, processor = sent_bytes(), time.perf_counter(), time.process_time()
        self.step.backward(nats(self.step.model, self.ids))
        self.step.update()
        dist.barrier()
        taken = time.perf_counter() - wall, time.process_time() - processor, sent_bytes() - sent
        self.states_bytes = self.step.held_bytes()
        self.step.zero_grad()
        return taken


def sent_bytes() -> int:
    """Return how many bytes this rank's link has sent since it came up; 0 where there is none."""
    found = re.search(
        r"^ *eth0:(.*)", Path("/proc/self/net/dev").read_text(encoding="utf-8"), re.MULTILINE
    )
    return int(found[1].split()[8]) if found else 0


def guard_cost(overrides: Sequence[str]) -> dict[str, float]:
    """Return medians in ms, and the guard's share of a step. overrides: key=value, over SIZE."""
    torch.set_num_threads(1)
    config, context = load(None, [*SIZE, *overrides]), ParallelContext()
    model = build_model(config, context)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.data.vocab_size, (4, config.data.seq_len + 1), generator=generator)

    def step(guarded: bool) -> None:
        guard = Guard(model) if guarded else None  # includes making its hooks: an upper bound
        loss = nats(model, ids)
        if guard is not None:
            guard.note_loss(loss)
        loss.backward()
        zero = 0.0 if guard is None else guard.loss_as_zero()
        norm = clip_grad_norm(model.parameters(), set(), 1.0, context, zero)
        if guard is not None:
            guard.check(norm, context)
            guard.remove()
        optimizer.step()
        optimizer.zero_grad()

    runs = {guarded: partial(seconds, partial(step, guarded)) for guarded in (True, False)}
    times = in_turn(runs, GUARD_ROUNDS, WARM_UP)
    with_ms, without_ms = (1e3 * middle(times[guarded]) for guarded in (True, False))
    share = middle(times[True] / times[False] - 1)
    return {
        "rounds": GUARD_ROUNDS,
        "with_ms": with_ms,
        "without_ms": without_ms,
        "share_of_a_step": share,
    }


def nats(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the loss of tokens [B, S + 1]."""
    return F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
