"""The plan of inference: how the MoE layers run in prefill, and how in decode.

Prefill has many tokens and long transfers; decode has few tokens, and its transfers are all latency. So each shape has
a plan of its own, which is measured on forward passes of that shape:

    measure   as in training (planner.py), by forward times alone: for each number of chunks, the best slot of every
    price     MoE layer
    try       passes in turn, round after round: sequential, and overlapped with each number of chunks
    choose    the way with the least time; where overlap gains less than LEAST_GAIN, the plan is sequential

All ranks choose by the same numbers: operator times as in pricing.py, passes by the slowest rank.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from scmoe.blocks.moe_block import MoEBlock
from scmoe.moe.dispatcher import Blocking, Dispatcher
from scmoe.planning.planner import Planner
from scmoe.planning.pricing import gather
from scmoe.schedule.schedule import Schedule

ROUNDS = 7
LEAST_GAIN = 0.02  # of a pass; a smaller gain is within the noise, and sequential is simpler


@dataclass(frozen=True)
class InferencePlan:
    """How the MoE layers run in passes of one shape.

    schedules: of each MoE layer. overlapped: False: each transfer is waited for at once. seconds: of a pass, the median
    over rounds of the slowest rank, by way: `sequential`, `overlapped x 2` for two chunks.
    """

    schedules: tuple[Schedule, ...]
    overlapped: bool
    seconds: dict[str, float]

    def run(self, blocks: Sequence[MoEBlock], dispatchers: Sequence[Dispatcher]) -> None:
        """Makes the blocks run as planned."""
        for block, schedule, dispatcher in zip(blocks, self.schedules, dispatchers, strict=True):
            block.run_as(schedule, dispatcher if self.overlapped else Blocking(dispatcher))

    def __str__(self) -> str:
        """One line for `what ran`: the way, and the times by which it was chosen."""
        slots = sorted({f"{schedule.place} x {schedule.chunks}" for schedule in self.schedules})
        way = f"overlapped, {', '.join(slots)} (slot x chunks)" if self.overlapped else "sequential"
        return f"{way}; a pass takes " + ", ".join(f"{1e3 * s:.1f} ms {name}" for name, s in self.seconds.items())


def plan_inference(
    blocks: Sequence[MoEBlock],
    forward: Callable[[], Any],
    group: Any,
    device: torch.device,
    chunk_counts: Sequence[int] = (1, 2, 4),
    passes: int = 1,
    ep_size: int | None = None,
) -> InferencePlan:
    """Returns the plan for passes like `forward`, and leaves the blocks as they were. Every rank must call it.

    forward: runs one pass without gradients, each time of the same shape, through all `blocks`. group: the ranks whose
    times count; they must run the same number of passes. passes: timed together, where one is too short to time.
    ep_size: consecutive ranks of the group that exchange rows; None: all.
    """
    own, dispatchers = tuple(block.schedule for block in blocks), [block.moe.dispatcher for block in blocks]
    ways = {"sequential": InferencePlan(own, False, {})}
    for chunks, schedules in best_schedules(blocks, forward, group, device, chunk_counts, ep_size).items():
        ways[f"overlapped x {chunks}"] = InferencePlan(schedules, True, {})
    rounds: list[list[float]] = []
    for _ in range(ROUNDS):
        rounds.append([])
        for way in ways.values():
            way.run(blocks, dispatchers)
            rounds[-1].append(pass_seconds(forward, group, device, passes))
    InferencePlan(own, True, {}).run(blocks, dispatchers)
    slowest_RW = gather(torch.tensor(rounds, dtype=torch.float64), group).amax(0)
    seconds = dict(zip(ways, (median(column) for column in slowest_RW.T.tolist()), strict=True))
    return replace(ways[fastest(seconds)], seconds=seconds)


def best_schedules(
    blocks: Sequence[MoEBlock],
    forward: Callable[[], Any],
    group: Any,
    device: torch.device,
    chunk_counts: Sequence[int],
    ep_size: int | None = None,
) -> dict[int, tuple[Schedule, ...]]:
    """Returns the best schedule of each MoE layer, by number of chunks; arguments as above."""
    planner = Planner(blocks, group, device, chunk_counts, ep_size=ep_size, directions=("forward",))
    while not planner.priced:
        planner.begin_step()
        forward()
        planner.end_step()
    planner.close()
    return {chunks: tuple(choice.schedule for choice in choices) for chunks, (choices, *_) in planner.priced.items()}


def fastest(seconds: Mapping[str, float]) -> str:
    """Returns the way with the least time; sequential where that gains less than LEAST_GAIN."""
    best = min(seconds, key=lambda way: seconds[way])
    return best if seconds[best] <= (1 - LEAST_GAIN) * seconds["sequential"] else "sequential"


def pass_seconds(forward: Callable[[], Any], group: Any, device: torch.device, passes: int) -> float:
    """Seconds of a pass, the mean of `passes`, all work of the device included. The ranks begin together."""
    dist.barrier(group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(passes):
        forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / passes
