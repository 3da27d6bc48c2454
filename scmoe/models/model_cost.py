"""What a model costs, computed from its modules: products, transfers, parameters; and what a GPU
computes at its peak. Nothing is run; the model may be on the meta device.

A multiplication and an addition count as two FLOPs, so the product of a row and a matrix W costs 2
|W|:

    forward    2 |W| of every Linear and convolution + 2 |W_expert| of every row that an expert
               computes + 4 S A of every token's attention: Q K^T and its product with V over the
               whole context S, with A features of all heads, usually D;
                 with latents, 2 S of the features of all heads' keys and values
    backward   twice that: each product has two, for its input and for its weight
    training   forward + backward, + forward again of what activation checkpointing repeats (an
               upper bound: torch leaves out the last product of each sub-layer, because its result
               is not used)

The masked half of causal attention counts, as is usual for kernels. Not counted: everything that is
not a product (softmax, norms, activations, the layout of the MoE stream), and SwinV2's position
bias, computed once a batch.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.sublayers import MLP, SelfAttention
from scmoe.moe.coefficient import CG1, CG2
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Buffers, Capacity
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream

# of a weight, its gradient, its moments
WEIGHT_BYTES = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2, "64-true": 8}
# of activations and sent rows
COMPUTE_BYTES = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2, "64-true": 8}
FLOP_KINDS: dict[type[nn.Module], str] = {  # kinds of FLOPs, beside those of experts and head
    SelfAttention: "attention",
    MLP: "MLP",
    Router: "gate",
}
RECOMPUTED_KINDS = ("attention", "MLP", "shared expert", "experts")  # by blocks/sublayers.py
PARAMETER_KINDS: dict[type[nn.Module], str] = {  # kinds of parameters
    nn.Embedding: "embedding",
    nn.LayerNorm: "norms",
    nn.RMSNorm: "norms",
    SelfAttention: "attention",
    MLP: "MLP",
    Router: "gates",
    CG1: "gates",
    CG2: "gates",
    Experts: "experts",
}
NAMED_PARTS = {  # by name, before the class
    "shared_expert": "shared expert",
    "patches": "patches",
    "merges": "patches",
    "head": "output",
    "other": "other",
}
BF16_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,  # SXM
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,  # SXM
    "NVIDIA H200 NVL": 835.5,
}


def moe_uses(model: nn.Module) -> Iterator[tuple[MoEStream, int]]:
    """Yield each MoE module once for every block that uses it, with the copies of a token that the
    block routes."""
    for block in model.modules():
        for child in block.children():
            if isinstance(child, MoEStream):
                yield child, child.router.top_k * (2 if isinstance(block, DoubleGateBlock) else 1)


def routed_copies(model: nn.Module) -> dict[Experts, float]:
    """Return the copies of a token that each Experts module computes in one forward pass, summed
    over its uses."""
    copies = defaultdict[Experts, float](float)
    for moe, routed in moe_uses(model):
        copies[moe.experts] += real_copies(moe, routed)
    return dict(copies)


def real_copies(moe: MoEStream, copies: int) -> float:
    """Return the copies of a token that go to experts, not to zero experts, at an even load."""
    return copies * moe.router.num_experts / moe.router.num_ids


def rows_computed(moe: MoEStream, copies: int) -> float:
    """Return the rows that the experts compute for a token, empty slots included; an upper bound
    where only filled slots are computed. A capacity counts as it is, not rounded up to whole slots
    and to equal chunks.
    """
    if isinstance(moe.rows, Capacity) and not moe.rows.filled:
        most = copies * moe.router.num_experts / moe.router.top_k  # a token chooses an expert once
        return min(moe.rows.factor * real_copies(moe, copies), most)
    return real_copies(moe, copies)


def rows_sent(moe: MoEStream, copies: int) -> float:
    """Return the rows that are sent for a token, and for which the experts allocate memory; with
    buffers, empty rows count too."""
    return (
        copies * moe.rows.ceiling if isinstance(moe.rows, Buffers) else rows_computed(moe, copies)
    )


def forward_flops(model: Any, seq_len: int, empty_slots: bool = True) -> dict[str, float]:
    """Return the FLOPs of one sample's forward pass by kind of module. seq_len: tokens of a text;
    not read for pictures.

    empty_slots: count what experts compute in empty slots. Without it these are the model FLOPs, of
    which MFU is a share: one product for each routed copy, a dropped copy included."""
    rows, flops = model.rows_per_sample(seq_len), defaultdict[str, float](float)
    kind_of = {model.head: "head"}
    for name, module in model.named_modules():
        is_shared = name.endswith("shared_expert")
        if kind := "shared expert" if is_shared else kind_in(FLOP_KINDS, module):
            kind_of |= dict.fromkeys(module.modules(), kind)
    for module in model.modules():
        kind = kind_of.get(module, "other")
        if kind == "gate":  # counted below, once for each use
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            flops[kind] += rows[module] * 2 * module.weight.numel()
        elif isinstance(module, SelfAttention):
            flops[kind] += rows[module] * 2 * module.context(seq_len) * module.mixed
    for moe, copies in moe_uses(model):
        size = sum(p[0].numel() for p in moe.experts.parameters())
        computed = rows_computed(moe, copies) if empty_slots else real_copies(moe, copies)
        flops["experts"] += rows[moe] * 2 * size * computed
        gate = sum(p.numel() for p in moe.router.parameters() if p.requires_grad)
        flops["gate"] += rows[moe] * 2 * gate * copies / moe.router.top_k
    return dict(flops)


def training_flops(forward: dict[str, float], recompute: bool = False) -> float:
    """Return the FLOPs of one sample's training step."""
    return 3 * sum(forward.values()) + recompute * sum(
        forward.get(kind, 0.0) for kind in RECOMPUTED_KINDS
    )


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, set[nn.Parameter]]]:
    """Yield the kind of each part, its module, and its parameters without those of earlier parts
    (tied weights).

    Every parameter is in one part; what is in no known module is in the last one, "other".
    """
    seen: set[nn.Parameter] = set()
    for name, module in [*model.named_modules(), ("other", model)]:  # at last the rest
        kind = NAMED_PARTS.get(name.rpartition(".")[2]) or kind_in(PARAMETER_KINDS, module)
        if kind and (rest := set(module.parameters()) - seen):
            seen |= rest
            yield kind, module, rest


def kind_in(kinds: Mapping[type[nn.Module], str], module: nn.Module) -> str | None:
    return next((kind for base, kind in kinds.items() if isinstance(module, base)), None)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return per kind of module: the number of modules, all parameters, and the parameters that one
    token uses.

    Experts count whole, also where this rank holds a shard. Of num_experts a token uses top_k, and
    others in each further use of the module (DGMoE, DGMoE-Share) as long as there are others.
    """
    counts: dict[str, tuple[int, int, int]] = {}
    used: dict[nn.Module, float] = {
        experts: min(1.0, copies / experts.num_experts)
        for experts, copies in routed_copies(model).items()
    }
    for kind, module, parameters in parts(model):
        size = sum(p.numel() for p in parameters)
        if isinstance(module, Experts):
            size = size * module.num_experts // len(module.expert_ids)
        modules, total, active = counts.get(kind, (0, 0, 0))
        counts[kind] = (modules + 1, total + size, active + round(size * used.get(module, 1.0)))
    return counts


def total_and_active(counts: Mapping[str, tuple[int, int, int]]) -> tuple[int, int]:
    """Return all parameters, and those that one token uses. counts: of `count_parameters`."""
    total = sum(total for _, total, _ in counts.values())
    active = sum(active for _, _, active in counts.values())
    return total, active


def peak_tflops(device_name: str | None, precision: str) -> float | None:
    """Return the TFLOP/s of a GPU of this name, as torch.cuda.get_device_name gives it; None where
    they are not known: another card, float32, a CPU (None). Variants of one card differ by a third.

    It is the denominator of MFU: the vendor's rate of bfloat16 products on tensor cores, dense
    (data sheets of NVIDIA print the rate with sparsity, which is twice that).

        A100   NVIDIA's datasheet, nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
        H100   https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
        H200   https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446
    """
    return BF16_TFLOPS.get(device_name or "") if precision.startswith("bf16") else None
