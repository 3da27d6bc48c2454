"""Prefill and decode that run as planned: each shape has a plan of its own (planning/inference_planner.py)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.inference.passes import Shape, decode, prefill
from scmoe.models.decoder import Decoder
from scmoe.moe.stream import dropless
from scmoe.planning.inference_planner import InferencePlan, plan_inference

PASSES: dict[Shape, int] = {"prefill": 1, "decode": 5}  # timed together


class PlannedPasses:
    """Makes a model run as planned for the shape that comes next; use it as Passes.begin."""

    def __init__(self, model: Decoder, plans: dict[Shape, InferencePlan]) -> None:
        self.blocks, self.plans = moe_blocks_of(model), plans
        self.dispatchers = [block.moe.dispatcher for block in self.blocks]

    def __call__(self, shape: Shape) -> None:
        self.plans[shape].run(self.blocks, self.dispatchers)


def plan_passes(model: Decoder, batch_size: int, prompt: int, group: Any, ep_size: int) -> PlannedPasses:
    """Measures both shapes and returns their plans. Every rank must call it; each with its own numbers.

    prompt: tokens of a text that one prefill reads. Random tokens are read, since times hardly depend on which."""
    vocab_size, device = model.head.out_features, model.head.weight.device
    ids_BS = torch.randint(vocab_size, (batch_size, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode(), dropless(model):
        plans = {
            shape: plan_inference(
                moe_blocks_of(model), a_pass(model, shape, ids_BS), group, device, passes=passes, ep_size=ep_size
            )
            for shape, passes in PASSES.items()
        }
    return PlannedPasses(model, plans)


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
