"""The plan of inference: how the MoE layers run in prefill, and how in decode.

Prefill has many tokens and long transfers; decode has few tokens, and its transfers are all
latency. So each shape has a plan of its own, which is measured on forward passes of that shape:

    measure   as in training (planning/planner.py), by forward times alone: for each number of
              chunks, the best slot of
    price     every MoE layer
    try       passes in turn, round after round: sequential, and overlapped with each number of
              chunks
    choose    the way with the least time; where overlap gains less than LEAST_GAIN, the plan is
              sequential

All ranks choose by the same numbers: operator times as in planning/pricing.py, passes by the
slowest rank.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.moe_block import MoEBlock, moe_blocks_of
from scmoe.inference.generate import Shape, decode, prefill
from scmoe.models.decoder import Decoder
from scmoe.moe.dispatcher import Blocking, Dispatcher
from scmoe.moe.operators import Recorder
from scmoe.moe.stream import dropless
from scmoe.planning.planner import Planner
from scmoe.planning.pricing import slowest, start_clocks
from scmoe.schedule.schedule import Schedule

PASSES: dict[Shape, int] = {"prefill": 1, "decode": 5}  # timed together
ROUNDS = 7
LEAST_GAIN = 0.02  # of a pass; a smaller gain is within the noise, and sequential is simpler


@dataclass(frozen=True)
class InferencePlan:
    """How the MoE layers run in passes of one shape.

    schedules: of each MoE layer. overlapped: False: each transfer is waited for at once. seconds:
    of a pass, the median over rounds of the slowest rank, by way: `sequential`, `overlapped x 2`
    for two chunks.
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
        return f"{way}; a pass takes " + ", ".join(
            f"{1e3 * s:.1f} ms {name}" for name, s in self.seconds.items()
        )


def plan_inference(
    blocks: Sequence[MoEBlock],
    forward: Callable[[], Any],
    group: Any,
    device: torch.device,
    chunk_counts: Sequence[int] = (1, 2, 4),
    passes: int = 1,
    ep_size: int | None = None,
) -> InferencePlan:
    """Returns the plan for passes like `forward`, and leaves the blocks as they were. Every rank
    must call it.

    forward: runs one pass without gradients, each time of the same shape, through all `blocks`.
    group: the ranks whose times count; they must run the same number of passes. passes: timed
    together, where one is too short to time. ep_size: consecutive ranks of the group that exchange
    rows; None: all.
    """
    own, dispatchers = (
        tuple(block.schedule for block in blocks),
        [block.moe.dispatcher for block in blocks],
    )
    ways = {"sequential": InferencePlan(own, False, {})}
    for chunks, schedules in best_schedules(
        blocks, forward, group, device, chunk_counts, ep_size
    ).items():
        ways[f"overlapped x {chunks}"] = InferencePlan(schedules, True, {})
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            way.run(blocks, dispatchers)
            times[name].append(pass_seconds(forward, group, device, passes))
    InferencePlan(own, True, {}).run(blocks, dispatchers)
    seconds = {name: median(taken) for name, taken in times.items()}
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
    return {
        chunks: tuple(choice.schedule for choice in choices)
        for chunks, (choices, *_) in planner.priced.items()
    }


def fastest(seconds: Mapping[str, float]) -> str:
    """Returns the way with the least time; sequential where that gains less than LEAST_GAIN."""
    best = min(seconds, key=lambda way: seconds[way])
    return best if seconds[best] <= (1 - LEAST_GAIN) * seconds["sequential"] else "sequential"


def pass_seconds(
    forward: Callable[[], Any], group: Any, device: torch.device, passes: int
) -> float:
    """Seconds of a pass on the slowest rank, the mean of `passes`, all work of the device included.
    Every rank must call it, and all begin together."""
    clock = Recorder(device)
    start_clocks([clock], group)
    for _ in range(passes):
        forward()
    return slowest(clock, group) / passes


def plan_passes(
    model: Decoder, batch_size: int, prompt: int, ep_size: int
) -> tuple[dict[Shape, InferencePlan], Callable[[Shape], None]]:
    """Measures both shapes. Returns their plans, and a function for Passes.begin that makes the
    model run as planned. Every rank must call it; each with its own numbers.

    prompt: tokens of a text that one prefill reads. Random tokens are read, since times hardly
    depend on which.
    """
    blocks, vocab_size, device = (
        moe_blocks_of(model),
        model.head.out_features,
        model.head.weight.device,
    )
    dispatchers = [block.moe.dispatcher for block in blocks]
    ids_BS = torch.randint(
        vocab_size, (batch_size, prompt), generator=torch.Generator().manual_seed(0)
    ).to(device)
    with torch.inference_mode(), dropless(model):
        plans = {
            shape: plan_inference(
                blocks, a_pass(model, shape, ids_BS), None, device, passes=passes, ep_size=ep_size
            )
            for shape, passes in PASSES.items()
        }
    return plans, lambda shape: plans[shape].run(blocks, dispatchers)


def a_pass(model: Decoder, shape: Shape, ids_BS: Tensor) -> Callable[[], Tensor]:
    """One pass of this shape after or over these prompts; each call finds an equal cache."""
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    batch_size, prompt = ids_BS.shape
    if shape == "prefill":
        return lambda: prefill(model, ids_BS, mask_BS, KVCache(batch_size, prompt, ids_BS.device))
    cache = KVCache(batch_size, prompt + 1, ids_BS.device)
    prefill(model, ids_BS, mask_BS, cache)
    # a shallow copy has lengths of its own, and writes the same place of the buffers each time
    return lambda: decode(model, ids_BS[:, -1], [True] * batch_size, copy.copy(cache))
