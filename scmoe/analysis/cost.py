"""What a model costs, read off its modules: products, transfers, parameters of a rank. Nothing is run, and a model on
the meta device will do.

FLOPs, a multiplication and an addition counting as two, so that a row's product by a matrix W costs 2 |W|:

    forward    2 |W| of every Linear and convolution + 2 |W_expert| of every row that an expert computes
               + 4 S D of every token's attention: Q K^T and its product with V over the whole context S
    backward   twice that: each product has two, for its input and for its weight
    training   forward + backward, + forward again of what activation checkpointing computes anew (an upper bound:
               torch spares the last product of each sub-layer, whose result nobody wants)

The masked half of a causal attention counts, as kernels are usually counted. Left out is what is no product: softmax,
norms, activations, the layout of the MoE stream; and SwinV2's position bias, which is computed once a batch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain
from math import prod
from typing import Any

from torch import nn

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.sublayers import Attention
from scmoe.moe.experts import Experts
from scmoe.moe.stream import MoEStream

WEIGHT_BYTES = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2, "64-true": 8}  # and of its gradient and its moments
COMPUTE_BYTES = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2, "64-true": 8}  # of what is computed and sent
# by the class's name: SwinV2 can be imported only where the extra `vision` is installed
KINDS = {"Attention": "attention", "ShiftedWindows": "attention", "MLP": "MLP", "Router": "gate"}
RECOMPUTED = ("attention", "MLP", "shared expert", "experts")  # by blocks/recompute.py


# ---------------------------------------------------------------------- who sees how many rows


def rows_per_sample(model: Any, seq_len: int) -> dict[nn.Module, float]:
    """Rows that each module sees of one sample: a text's tokens, or the places of a picture's map at that stage."""
    if not hasattr(model, "stages"):
        return dict.fromkeys(model.modules(), float(seq_len))
    rows = dict.fromkeys(model.head.modules(), 1.0)
    places = float(model.patches.num_patches)
    rows |= dict.fromkeys(model.patches.modules(), places)
    for merge, stage in zip(model.merges, model.stages, strict=True):
        places /= 1 if isinstance(merge, nn.Identity) else 4
        rows |= dict.fromkeys(chain(merge.modules(), stage.modules()), places)
    rows |= dict.fromkeys(model.norm.modules(), places)
    once_a_batch = (m.cpb_mlp.modules() for m in model.modules() if hasattr(m, "cpb_mlp"))
    return rows | dict.fromkeys(chain.from_iterable(once_a_batch), 0.0)


def moe_uses(model: nn.Module) -> Iterator[tuple[MoEStream, int]]:
    """Every MoE module as often as a block uses it, and the copies of a token that this use routes."""
    for block in model.modules():
        for child in block.children():
            if isinstance(child, MoEStream):
                yield child, child.router.top_k * (2 if isinstance(block, DoubleGateBlock) else 1)


def routed_copies(model: nn.Module) -> dict[Experts, int]:
    """Copies of a token that each Experts module gets in one forward pass, all uses together."""
    copies: Counter[Experts] = Counter()
    for moe, routed in moe_uses(model):
        copies[moe.experts] += routed
    return dict(copies)


def rows_per_token(moe: MoEStream, copies: int) -> float:
    """Rows that are sent and computed for a token: with fixed capacity, empty slots too."""
    return copies * (1.0 if moe.capacity_factor is None else moe.capacity_factor)


# ---------------------------------------------------------------------- FLOPs


def forward_flops(model: Any, seq_len: int) -> dict[str, float]:
    """FLOPs of one sample's forward pass by kind of module. seq_len: tokens of a text; for pictures it is not read."""
    rows, flops = rows_per_sample(model, seq_len), defaultdict[str, float](float)
    kind_of = {model.head: "head"}
    for name, module in model.named_modules():
        kind = "shared expert" if name.endswith("shared_expert") else KINDS.get(type(module).__name__)
        if kind:
            kind_of |= dict.fromkeys(module.modules(), kind)
    for module in model.modules():
        kind = kind_of.get(module, "other")
        if kind == "gate":  # below, as often as it is used
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            flops[kind] += rows[module] * 2 * module.weight.numel()
        elif isinstance(module, Attention):
            flops[kind] += rows[module] * 4 * seq_len * module.out.in_features
        elif type(module).__name__ == "ShiftedWindows":
            flops[kind] += rows[module] * 4 * prod(module.window) * module.attention.proj.in_features
    for moe, copies in moe_uses(model):
        size = sum(p[0].numel() for p in moe.experts.parameters())
        flops["experts"] += rows[moe] * 2 * size * rows_per_token(moe, copies)
        gate = sum(p.numel() for p in moe.router.parameters())
        flops["gate"] += rows[moe] * 2 * gate * copies / moe.router.top_k
    return dict(flops)


def training_flops(forward: dict[str, float], recompute: bool = False) -> float:
    """FLOPs of one sample's training step."""
    return 3 * sum(forward.values()) + recompute * sum(forward.get(kind, 0.0) for kind in RECOMPUTED)


# ---------------------------------------------------------------------- transfers


def transfer_bytes(model: nn.Module, precision: str) -> list[float]:
    """Of each use of an MoE module: bytes of a token in one All-to-All, those that stay on their rank included.

    Forward has two of them, dispatch and combine, and backward two more of the same size. One in EP of the experts is
    a token's own rank's, so (EP - 1) / EP of the bytes really travel where the load is even.
    """
    width = COMPUTE_BYTES[precision]
    return [rows_per_token(moe, copies) * moe.experts.w_in_eDF.shape[1] * width for moe, copies in moe_uses(model)]


# ---------------------------------------------------------------------- parameters


def rank_parameters(model: nn.Module, ep_size: int) -> tuple[int, int]:
    """Replicated parameters, and those of the experts that one of ep_size ranks holds. model: whole; tied ones count
    once."""
    experts = {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    replicated = sum(p.numel() for p in model.parameters() if p not in experts)
    return replicated, sum(p.numel() for p in experts) // ep_size
