"""Step time and states of dense weights that are replicated (DDP), or split over all ranks or a node's (FSDP2).

Ranks on this machine, one thread each: forward, backward, clipping and AdamW of a configured model on random tokens,
variants in turn. The ranks are joined by the loopback device, or by links of the rate at which the transfers of a
sequential top-2 pair of this size are a share of its forward time. `at_once` is sharded as FSDP does it on gloo: it
waits for each gather and each sum.

    link    time in which a rank's link carries what it sends in a step: rows, gathers, scatters, sums
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.experiments.bench.overlap import Bench, find_rate
from scmoe.experiments.bench.pairs import Setting
from scmoe.experiments.engine.ranks import run_ranks
from scmoe.lightning.seam import hide_from_ddp
from scmoe.parallel.dense_shards import local, prefetch, with_dense_mesh
from scmoe.parallel.mesh import ParallelContext, build_context, expert_parameters
from scmoe.parallel.update.clipping import clip_grad_norm
from scmoe.parallel.update.pacing import BUCKET_MB, pacing
from scmoe.parallel.update.reducer import ExpertGradientReducer
from scmoe.parallel.update.scatters import paced_scatters
from scmoe.training.assembly.model import build_model

WARM_UP = 2
SIZE = ("data.name=synthetic", "data.seq_len=128", "data.vocab_size=4096", "model.layers=4", "model.dim=256")


class Step(NamedTuple):
    """Wall-clock and processor seconds of a step, and bytes that this rank has sent to its link, if it has one."""

    seconds: float
    processor: float
    sent: float


def bench_dense(
    ranks: int, ep_size: int, batch: int, rounds: int, share: float | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return medians. hybrid has two nodes. batch: sequences of a rank. overrides: key=value, over SIZE. share: of
    communication; the caller has entered a network namespace. None: loopback."""
    given = ep_size, batch, rounds, share, tuple(overrides)
    report, *_ = run_ranks(measure, ranks, *given, timeout_s=3600, own_links=share is not None)
    return report


def measure(
    rank: int, world_size: int, ep_size: int, batch: int, rounds: int, share: float | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Runs on every rank; the caller uses rank 0's result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config, timeout, device = load(None, [*SIZE, *overrides]), timedelta(seconds=600), torch.device("cpu")
    mbit = None if share is None else find_rate(Bench(pair_of(config, share, batch)))
    context = build_context(ep_size, device, timeout)
    sharded = with_dense_mesh(context, "sharded", world_size // 2, device, timeout)
    steps = {
        "replicated": Training(context, batch, config),
        "sharded": Training(sharded, batch, config),
        "at_once": Training(sharded, batch, config, hidden=False),
    }
    if world_size > 3:
        hybrid = with_dense_mesh(context, "hybrid", world_size // 2, device, timeout)
        steps["hybrid"] = Training(hybrid, batch, config)
    times = [{way: step() for way, step in steps.items()} for _ in range(WARM_UP + rounds)][WARM_UP:]

    def of(way: str) -> dict[str, float]:
        own, base = [t[way] for t in times], [t["replicated"] for t in times]
        pairs = list(zip(own, base, strict=True))
        report = {
            "ms": 1e3 * median(t.seconds for t in own),
            "time_ratio": median(t.seconds / b.seconds for t, b in pairs),
            "processor_ratio": median(t.processor / b.processor for t, b in pairs),
            "states_mib": steps[way].states_bytes() / 2**20,
        }
        return report if mbit is None else report | {"link_ms": 1e3 * median(t.sent for t in own) * 8 / (mbit * 1e6)}

    return {way: of(way) for way in steps} | ({} if mbit is None else {"link_mbit": mbit})


def pair_of(config: Config, share: float, batch: int) -> Setting:
    """Return a pair of the model's size, for which the links' rate is searched."""
    model, tokens = config.model, batch * config.data.seq_len
    return Setting(
        share,
        compute="real",
        dim=model.dim,
        ffn_dim=model.ffn_dim or 4 * model.dim,
        heads=model.heads,
        tokens=tokens,
        seq_len=config.data.seq_len,
        num_experts=config.moe.num_experts,
        rows=(),
    )


class Training:
    """A model with its optimizer, on this rank. Calling it takes a step. hidden: gathers and sums, as in a run."""

    def __init__(self, context: ParallelContext, batch: int, config: Config, hidden: bool = True) -> None:
        self.context, self.model = context, build_model(config, context)
        experts = list(expert_parameters(self.model))
        self.shards, self.parameters = {p for _, p in experts}, list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)
        self.split = context.dense_mesh is not None
        self.run: Any = self.model
        self.scatters, self.until_end = None, ExitStack()  # if it were freed, pacers would stop
        if not self.split:
            hide_from_ddp(self.model, [name for name, _ in experts])
            self.run = DistributedDataParallel(self.model, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB)
            pacer = self.until_end.enter_context(pacing(self.run, context))
            ExpertGradientReducer([p for _, p in experts], context, pacer)
        elif not hidden:
            prefetch(self.model, False)
        elif context.dense_mesh is not None and context.dense_mesh.ndim == 1:
            self.scatters = self.until_end.enter_context(paced_scatters(self.model, context))
        self.ids = torch.randint(config.data.vocab_size, (batch, config.data.seq_len + 1))

    def __call__(self) -> Step:
        dist.barrier()
        sent, start = sent_bytes(), (time.perf_counter(), time.process_time())
        loss = F.cross_entropy(self.run(self.ids[:, :-1])[0].flatten(0, 1), self.ids[:, 1:].flatten())
        with self.scatters.during_backward() if self.scatters else nullcontext():
            (loss / self.context.world_size if self.split else loss).backward()
        clip_grad_norm(self.parameters, self.shards, 1.0, self.context)
        self.optimizer.step()
        dist.barrier()
        step = Step(time.perf_counter() - start[0], time.process_time() - start[1], sent_bytes() - sent)
        self.gradients = sum(local(p.grad).nbytes for p in self.parameters if p.grad is not None)
        self.optimizer.zero_grad()
        return step

    def states_bytes(self) -> int:
        moments = (local(t) for state in self.optimizer.state.values() for t in state.values())
        return self.gradients + sum(local(t).nbytes for t in self.parameters) + sum(t.nbytes for t in moments)


def sent_bytes() -> int:
    """Return how many bytes this rank's link has sent since it came up; 0 where there is none."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "eth0":
            return int(counters.split()[8])
    return 0
