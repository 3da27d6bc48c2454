"""Step time and states of dense weights that are replicated (DDP), or split over all ranks or a node's (FSDP2).

Ranks on this machine, one thread each, joined by the loopback device: forward, backward, clipping and AdamW of a
configured model on random tokens, variants in turn. FSDP on gloo hides nothing: its collectives block.
"""

import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from scmoe.config.load import load
from scmoe.parallel.dense_shards import local, with_dense_mesh
from scmoe.parallel.lightning_seam import hide_from_ddp
from scmoe.parallel.mesh import ParallelContext, build_context, expert_parameters
from scmoe.parallel.update.clipping import clip_grad_norm
from scmoe.parallel.update.reducer import ExpertGradientReducer
from scmoe.testbed.ranks import run_ranks
from scmoe.training.build.model import build_model

WAYS, WARM_UP = ("replicated", "sharded", "hybrid"), 2
SIZE = ("data.name=synthetic", "data.seq_len=128", "data.vocab_size=4096", "model.layers=4", "model.dim=256")


def bench_dense(ranks: int, ep_size: int, batch: int, rounds: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Return medians. hybrid has two nodes. batch: sequences of a rank. overrides: key=value, over SIZE."""
    report, *_ = run_ranks(measure, ranks, ep_size, batch, rounds, tuple(overrides), timeout_s=3600)
    return report


def measure(
    rank: int, world_size: int, ep_size: int, batch: int, rounds: int, overrides: Sequence[str]
) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    timeout, device = timedelta(seconds=600), torch.device("cpu")
    context = build_context(ep_size, device, timeout)
    ways = {"replicated": context}
    for way in WAYS[1:] if world_size > 3 else WAYS[1:2]:
        ways[way] = with_dense_mesh(context, way, world_size // 2, device, timeout)
    steps = {way: Training(of_way, batch, overrides) for way, of_way in ways.items()}
    times = [{way: step() for way, step in steps.items()} for _ in range(WARM_UP + rounds)][WARM_UP:]
    of = {}
    for way, step in steps.items():
        of[way] = {"ms": 1e3 * statistics.median(t[way][0] for t in times), "states_mib": step.states_bytes() / 2**20}
        for i, name in enumerate(("time_ratio", "processor_ratio")):
            of[way][name] = statistics.median(t[way][i] / t["replicated"][i] for t in times)
    return of


class Training:
    """A model with its optimizer, on this rank. Calling it takes a step and returns its seconds, and those of the
    processor: on a machine that does other work, the second says more."""

    def __init__(self, context: ParallelContext, batch: int, overrides: Sequence[str]) -> None:
        config = load(None, [*SIZE, *overrides])
        self.context, self.model = context, build_model(config, context)
        self.shards = {p for _, p in expert_parameters(self.model)}
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)
        self.split = context.dense_mesh is not None
        self.run: Any = self.model
        if not self.split:
            hide_from_ddp(self.model, [name for name, _ in expert_parameters(self.model)])
            ExpertGradientReducer([p for _, p in expert_parameters(self.model)], context)
            self.run = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.ids = torch.randint(config.data.vocab_size, (batch, config.data.seq_len + 1))

    def __call__(self) -> tuple[float, float]:
        dist.barrier()
        start = time.perf_counter(), time.process_time()
        loss = F.cross_entropy(self.run(self.ids[:, :-1])[0].flatten(0, 1), self.ids[:, 1:].flatten())
        (loss / self.context.world_size if self.split else loss).backward()
        clip_grad_norm(self.parameters, self.shards, 1.0, self.context)
        self.optimizer.step()
        dist.barrier()
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        self.gradients = sum(local(p.grad).nbytes for p in self.parameters if p.grad is not None)
        self.optimizer.zero_grad()
        return seconds

    def states_bytes(self) -> int:
        moments = (local(t) for state in self.optimizer.state.values() for t in state.values())
        return self.gradients + sum(local(t).nbytes for t in self.parameters) + sum(t.nbytes for t in moments)
