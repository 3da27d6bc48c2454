"""One pass of prefill or decode of a small GPT, its time, and the best schedules for it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.bench.inference.pass_figures import Shape
from scmoe.blocks.kv_cache import KVCache
from scmoe.inference.generate import decode, prefill
from scmoe.models.decoder import Decoder
from scmoe.moe.recorder import Recorder
from scmoe.planning.candidates import shortlist_in_flight
from scmoe.planning.choice import ModelChoice
from scmoe.planning.planner import Planner
from scmoe.planning.pricing import seconds_of_slowest_rank, start_clocks
from scmoe.schedule.schedule import Schedule

Priced = Mapping[int, Sequence[ModelChoice]]  # by number of chunks
PASSES: dict[Shape, int] = {"prefill": 1, "decode": 5}  # timed together


def a_pass(model: Decoder, shape: Shape, ids_BS: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs one pass over these prompts (prefill), or of one token after
    them (decode). Each call finds an equal cache."""
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    batch_size, prompt = ids_BS.shape
    if shape == "prefill":
        return lambda: prefill(model, ids_BS, mask_BS, KVCache(batch_size, prompt, ids_BS.device))

    cache = KVCache(batch_size, prompt + 1, ids_BS.device)
    prefill(model, ids_BS, mask_BS, cache)
    # a shallow copy has lengths of its own, and writes the same place of the buffers each time
    return lambda: decode(model, ids_BS[:, -1], [True] * batch_size, copy.copy(cache))


def price_passes(
    model: Decoder,
    forward: Callable[[], Any],
    group: Any,
    device: torch.device,
    chunk_counts: Sequence[int],
) -> Priced:
    """Return the priced schedules of the MoE layers by number of chunks, the best first, and leave
    the model as it was. Every rank must call it.

    forward: runs one pass of the model without gradients, each time of the same shape.
    group: the ranks whose times count; they must run the same number of passes.
    """
    planner = Planner(model, group, device, chunk_counts, directions=("forward",))
    while not planner.priced:
        planner.begin_step()
        forward()
        planner.end_step()
    planner.close()
    return planner.priced


def best_schedules(priced: Priced) -> dict[int, tuple[Schedule, ...]]:
    """Return the best schedule of each MoE layer by number of chunks."""
    return {chunks: best.schedule.blocks for chunks, (best, *_) in priced.items()}


def best_in_halves(priced: Priced) -> tuple[Schedule, ...]:
    """Return the best schedule of each MoE layer with two batches in flight, in one chunk each."""
    return shortlist_in_flight({1: priced[1]}, (2,))[0].schedule.blocks


def pass_seconds(
    forward: Callable[[], Any], group: Any, device: torch.device, passes: int
) -> float:
    """Return the seconds of a pass on the slowest rank, the mean of `passes`, all work of the
    device included. Every rank must call it, and all begin together."""
    clock = Recorder(device)
    start_clocks([clock], group)
    for _ in range(passes):
        forward()
    return seconds_of_slowest_rank(clock, group) / passes
