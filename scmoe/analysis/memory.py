"""Memory of a rank: weights, gradients and AdamW's moments are exact, activations are an estimate.

    weights       one number per parameter that the rank holds: the replicated ones, and 1 / EP of the experts
    gradients     the same; + the experts' again while they are averaged, where other ranks hold them too (DP > 1)
    optimizer     two moments per parameter, and a step count of 4 bytes per tensor

Activations are what autograd keeps between forward and backward. The table counts numbers per row: D is the width, F
the width inside an MLP, R the rows at the experts (empty slots included); w and a are 1 for GELU and 2 for SwiGLU:

    norm                  2 D                     its input and its output; of the tap's norm only the output
    attention             (1 + 2 kv/h) D + D      Q, K, V and their result; + (1 + kv/h) D with rotary positions
    window attention      7 D + 2 h S             SwinV2's: normed Q and K as well as Q, K, V; scores of the window's S
    MLP, shared expert    (w + a) F               before and after the activation function
    experts               R (2 D + w F)           rows, results, before the function; + R a F on a GPU
    gate                  3 E, in float32         + x in float32 where rows are narrower; 3 indices of 8 bytes a row
    coefficient           D (CG-1) or 2 D (CG-2)
    dropout               D, on a GPU in bytes
    head                  2 V                     logits, and their log-probabilities in float32

With activation checkpointing only the inputs of sub-layers are kept, D each, and the inside of the largest sub-layer,
shared expert or experts module is there while its backward runs. Under autocast the residual stream and the inputs of
norms are float32, and each product keeps a narrow copy of its weight. Not counted: the allocator's gaps, transfers in
flight, DDP's buckets.
"""

from collections import defaultdict
from typing import Any

from torch import nn

from scmoe.analysis.cost import COMPUTE_BYTES, WEIGHT_BYTES, moe_uses, rank_parameters, rows_sent
from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.sublayers import MLP, Residual, SelfAttention
from scmoe.models.decoder import Decoder
from scmoe.moe.coefficient import CG1, CG2


def rank_memory(
    model: Any, *, seq_len: int, samples: int, precision: str, ep_size: int, dp_size: int, recompute: bool, on_gpu: bool
) -> dict[str, int]:
    """Bytes on one rank: weights, gradients, optimizer, activations, and their total.

    model: the whole model, on any device. samples: samples of one rank in one batch. dp_size: number of ranks that hold
    the same experts."""
    width = WEIGHT_BYTES[precision]
    replicated, experts = rank_parameters(model, ep_size)
    weights = (replicated + experts) * width
    kept, repeated = activations(model, seq_len, precision, recompute, on_gpu)
    copies = narrow_copies(model, ep_size, recompute) if precision == "bf16-mixed" else 0
    parts = {
        "weights": weights,
        "gradients": weights + (experts * width if dp_size > 1 else 0),
        "optimizer": 2 * weights + 4 * sum(1 for _ in model.parameters()),
        "activations": copies + round(samples * (kept + repeated)),
    }
    return parts | {"total": sum(parts.values())}


def narrow_copies(model: Any, ep_size: int, recompute: bool = False) -> int:
    """Bytes of the weights in bfloat16 that autocast's products keep for backward, on one rank."""
    if recompute:  # parts that are computed again make their copies again
        return 2 * model.head.weight.numel()
    linear = sum(p.numel() for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    experts = sum(
        copies // m.router.top_k * sum(p.numel() for p in m.experts.parameters()) for m, copies in moe_uses(model)
    )
    return 2 * (linear + experts // ep_size)


def activations(model: Any, seq_len: int, precision: str, recompute: bool, on_gpu: bool = True) -> tuple[float, float]:
    """Bytes of one sample: what autograd keeps, and the largest part that is computed again at one time."""
    c = COMPUTE_BYTES[precision]
    wide = max(4, c)  # what stays in float32
    stream = 4 if precision == "bf16-mixed" else c  # of the residual stream
    rows = model.rows_per_sample(seq_len)
    unit_of: dict[nn.Module, nn.Module] = {}  # the sub-layer or the shared expert that a module is a part of
    for unit in model.modules():
        if isinstance(unit, (Residual, MLP)):
            unit_of = dict.fromkeys(unit.modules(), unit) | unit_of
    inside: defaultdict[Any, float] = defaultdict(float)
    for name, module in model.named_modules():
        if name.endswith("tap_norm"):
            continue
        size = rows.get(module, 0.0) * _kept_by(module, c, stream, on_gpu)
        if isinstance(module, MoEBlock) and module.tap_norm is not None:
            # its input is kept by the norm after the tap, which may be the same module
            size = rows[module] * _kept_by(module.tap_norm, c, 0, on_gpu)
        if isinstance(module, nn.Dropout) and module.p > 0:  # pictures have drop path, which keeps a number a sample
            size = rows[module] * model.tokens.embedding_dim * (1 if on_gpu else c)
        inside[unit_of.get(module)] += size
    kept = inside.pop(None)
    for i, (moe, copies) in enumerate(moe_uses(model)):
        num_rows, gates = rows_sent(moe, copies) * rows[moe], copies / moe.router.top_k * rows[moe]
        _, dim, hidden = moe.experts.w_in_eDF.shape
        kept += num_rows * (2 * dim * c + 3 * 8)
        kept += gates * (3 * moe.router.num_experts * wide + (dim * wide if c < 4 else 0))
        inside[f"experts {i}"] = num_rows * c * (hidden + on_gpu * _after(moe.experts))
    if recompute:
        kept += sum(rows[unit] * unit.f.dim * stream for unit in inside if isinstance(unit, Residual))
        return kept, max(inside.values())
    return kept + sum(inside.values()), 0.0


def _kept_by(module: Any, c: int, stream: int, on_gpu: bool) -> float:
    """Bytes of one row that the module itself keeps, without its submodules."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        in_steps = isinstance(module, nn.RMSNorm) and not on_gpu  # the host computes it in steps
        return module.weight.numel() * (stream + c + in_steps * max(4, c))
    if isinstance(module, SelfAttention):
        return module.kept_bytes(c)
    if isinstance(module, MLP):
        return c * (module.w_in.out_features + _after(module))
    if isinstance(module, (CG1, CG2)):
        return c * module.gate.in_features * module.gate.out_features
    if isinstance(module, Decoder):  # its logits
        return module.head.out_features * (c + max(4, c))
    return 0.0


def _after(mlp: Any) -> int:
    """Numbers of a row that are kept after the activation function; for SwiGLU the product and one of its factors."""
    out = mlp.w_out.in_features if isinstance(mlp, MLP) else mlp.w_out_eFD.shape[1]
    return mlp.act.widening * out
