"""`strategy.exchange: auto`: the first exchange of a run decides by measurement which one the others use."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.dispatcher import Traffic
from scmoe.parallel.wire.all_to_all import Exchange, Work

ROUNDS = 5  # after a first one, which may have to connect the ranks


class FastestExchange:
    """Takes the exchange that was the fastest for the rows of the first call. All of them give bit-identical rows.

    exchanges: by name. group: all ranks of the job, over gloo. They measure at the same time, because groups of ranks
    share the network, and use the same exchange. say: is given one line with the choice and the times.
    """

    def __init__(self, exchanges: Mapping[str, Exchange], group: Any, say: Callable[[str], None]) -> None:
        self.exchanges, self.group, self.say = exchanges, group, say
        self.chosen: str | None = None

    def __call__(self, rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Work]:
        if self.chosen is None:
            self.chosen = self.choose(rows, traffic)
        return self.exchanges[self.chosen](rows, traffic)

    def choose(self, rows: Tensor, traffic: Traffic | None) -> str:
        rounds = [[self.seconds(name, rows, traffic) for name in self.exchanges] for _ in range(1 + ROUNDS)]
        slowest = torch.tensor([median(own[1:]) for own in zip(*rounds, strict=True)], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, self.group)
        seconds = dict(zip(self.exchanges, slowest.tolist(), strict=True))
        chosen = min(seconds, key=lambda name: seconds[name])
        times = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items())
        self.say(f"strategy.exchange: {chosen} ({times} for {rows.nbytes / 1e3:.4g} kB of rank 0's first rows)")
        return chosen

    def seconds(self, name: str, rows: Tensor, traffic: Traffic | None) -> float:
        if rows.is_cuda:
            torch.cuda.synchronize()
        dist.barrier(self.group)
        start = time.perf_counter()
        _, work = self.exchanges[name](rows, traffic)
        work.wait()
        if rows.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start
