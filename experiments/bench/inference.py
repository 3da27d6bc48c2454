"""The measurement of `bench inference` on one rank: small GPTs of one pair of blocks, on links whose rate gives prefill
a share of communication.

    prefill   each rank reads a prompt into an empty cache: the time to the first token
    decode    each rank reads one token of each of `batch` texts, whose prompts are in the cache: the time of a token
    ways      sequential; overlapped with 1, 2 and 4 chunks, at the best slots for the shape; free, without transfers
    auto      the way that the plan of inference takes

The models are dropless and their experts get equal shares. Ways run in turn, round after round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.experiments.bench.overlap import Variant, find_rate, show, slowest
from scmoe.experiments.bench.pairs import Setting, default_schedule, make_block
from scmoe.experiments.engine import links
from scmoe.inference.passes import Shape
from scmoe.inference.planned import PASSES, a_pass
from scmoe.models.gpt import GPT
from scmoe.moe.dispatcher import Blocking, Dispatcher, Pending, Ready, Receipt, Traffic
from scmoe.parallel.wire.all_to_all_dispatcher import AllToAllDispatcher
from scmoe.planning.inference_planner import InferencePlan, best_schedules, pass_seconds, plan_inference
from scmoe.schedule.schedule import Schedule

BLOCKS = ("top2", "top1", "shared_expert", "pos1", "pos2", "pos3")
CHUNKS = (1, 2, 4)
VOCABULARY = 1024
SHAPES: tuple[Shape, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Free:
    """Transfers that return their own rows at once, and numbers of rows as if all ranks had announced the same."""

    inner: AllToAllDispatcher

    def announce(self, counts_PE: Tensor) -> Any:
        ranks = self.inner.ep_size
        by_rank = counts_PE.expand(ranks, *counts_PE.shape).reshape(ranks, len(counts_PE), ranks, -1)
        return self.inner.announced(Ready(None), by_rank, dist.get_rank(self.inner.group))

    def dispatch(self, rows_RD: Tensor, counts: Any) -> tuple[Pending, Receipt]:
        return self.inner.dispatch(rows_RD, counts)

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return self.inner.combine(rows_RD, receipt)


def keep(rows: Tensor, traffic: Traffic | None) -> tuple[Tensor, Any]:
    """An exchange without a network: every rank keeps its rows, which must be as many as it would receive."""
    assert traffic is None or sum(traffic.sent) == sum(traffic.received)
    return rows, Ready(rows)


class Way(NamedTuple):
    """How one model runs in passes of one shape. name: sequential, overlapped x 2, free."""

    block: str
    shape: Shape
    name: str
    schedule: Schedule


class InferenceBench:
    """Holds the models of one rank and runs passes. setting: its tokens are the prompt's, in one sequence."""

    def __init__(self, setting: Setting, batch: int) -> None:
        assert setting.compute == "real" and setting.tokens == setting.seq_len
        self.setting, self.device = setting, torch.device("cpu")
        self.group = dist.new_group()
        torch.manual_seed(0)
        self.models = {name: self.model(name) for name in BLOCKS}
        self.paid = AllToAllDispatcher(self.group, setting.num_experts)
        self.free = Free(AllToAllDispatcher(self.group, setting.num_experts, exchange=keep))
        prompts = {
            shape: torch.randint(VOCABULARY, (texts, setting.tokens))
            for shape, texts in zip(SHAPES, (1, batch), strict=True)
        }
        self.passes = {
            (name, shape): a_pass(model, shape, ids_BS)
            for name, model in self.models.items()
            for shape, ids_BS in prompts.items()
        }

    def model(self, name: str) -> GPT:
        s = self.setting
        block = make_block(name, s, self.group, capacity_factor=None)
        return GPT(VOCABULARY, s.seq_len + 1, s.dim, [block]).eval()

    def set_rate(self, mbit: float) -> None:
        links.set_rate(mbit)

    def infer(self, variant: Variant) -> tuple[float, float]:
        """Seconds of a prefill; the second number, of processor time, is not measured here."""
        return self.seconds(Way(variant.block, "prefill", variant.way, variant.schedule)), 0.0

    def seconds(self, way: Way) -> float:
        paid: Dispatcher = self.paid if way.name.startswith("overlapped") else Blocking(self.paid)
        self.blocks(way.block)[0].run_as(way.schedule, self.free if way.name == "free" else paid)
        return pass_seconds(self.passes[way.block, way.shape], self.group, self.device, PASSES[way.shape])

    def blocks(self, block: str) -> list[Any]:
        return list(self.models[block].blocks)

    def ways(self, block: str, shape: Shape) -> list[Way]:
        """All ways of a model in one shape, at the best slots for it."""
        (own,) = self.blocks(block)
        own.run_as(default_schedule(block), self.paid)
        best = best_schedules([own], self.passes[block, shape], self.group, self.device, CHUNKS)
        overlapped = [Way(block, shape, f"overlapped x {chunks}", best[chunks][0]) for chunks in CHUNKS]
        return [Way(block, shape, name, default_schedule(block)) for name in ("sequential", "free")] + overlapped

    def plan(self, block: str, shape: Shape) -> InferencePlan:
        blocks = self.blocks(block)
        blocks[0].run_as(default_schedule(block), self.paid)
        return plan_inference(blocks, self.passes[block, shape], self.group, self.device, CHUNKS, PASSES[shape])


def measure(rank: int, world_size: int, setting: Setting, batch: int) -> dict[str, Any]:
    """Runs on every rank; the caller uses rank 0's result: the rate, the plans, and seconds of each way by rounds."""
    dist.init_process_group("gloo")
    with torch.inference_mode():
        bench = InferenceBench(setting, batch)
        rate = find_rate(bench) if setting.shaped else None
        plans: dict[tuple[str, str], InferencePlan] = {}
        ways: list[Way] = []
        for block in BLOCKS:
            show(f"planning {block}")
            for shape in SHAPES:
                plans[block, shape] = bench.plan(block, shape)
                ways += bench.ways(block, shape)
        return {"rate": rate, "plans": plans, "times": rounds(bench, ways, setting.rounds)}


def rounds(bench: InferenceBench, ways: Sequence[Way], number: int) -> dict[Way, Any]:
    """Runs all ways in turn, `number` times after one to warm up; of each round the slowest rank's seconds."""
    seconds = []
    for i in range(number + 1):
        show(f"round {i} of {number}, {len(ways)} ways")
        seconds.append([bench.seconds(way) for way in ways])
    return dict(zip(ways, slowest(seconds[1:]).T, strict=True))
