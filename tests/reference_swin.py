"""This oracle computes SwinV2-MoE: flat, slow and obviously correct. It imports nothing of scmoe or
timm.

Windows are groups of places that are looked up one by one; MoE modules are
`reference.routed_experts`. All sub-layers are post-norm: x + norm(f(x)), without a norm before f
(docs/decisions/0014-post-norm.md). Drop path and filler pictures are left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference import (
    Routed,
    Spec,
    Weights,
    both,
    layer_norm,
    linear,
    load_balance_loss,
    merge,
    mlp,
    routed_experts,
)


class SwinSpec(NamedTuple):
    """The fields say what is computed and have the names of the config."""

    architecture: str
    layers: int  # of stage 3
    heads: int  # of stage 1
    patch_size: int
    window: int
    top_k: int = 1  # of stage 3; stage 4 is standard top-2
    position: str = "pos2"
    first_position: str | None = None
    combine: str = "cg1"
    coefficient_input: str = "current"
    every: int = 2
    capacity_factor: float | None = None
    distinct_experts: bool = True


class SwinAnswer(NamedTuple):
    logits: Tensor  # [B, C]
    load_balance_loss: Tensor | None
    dropped: list[int]  # of each MoE layer


def patches(w: Weights, images: Tensor, size: int) -> Tensor:
    """Return each patch's pixels after a product and a norm, [B, H, W, D]."""
    weight, bias = w["patches.proj.weight"].flatten(1), w["patches.proj.bias"]
    steps = range(0, images.shape[-1], size)
    rows = [
        torch.stack(
            [images[:, :, i : i + size, j : j + size].flatten(1) @ weight.T + bias for j in steps],
            1,
        )
        for i in steps
    ]
    return layer_norm(w, "patches.norm", torch.stack(rows, 1))


def merge_patches(w: Weights, name: str, x: Tensor) -> Tensor:
    """Merge 2 x 2 places into one and concatenate their features, first down, then right."""
    corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    return layer_norm(w, f"{name}.norm", torch.cat(corners, -1) @ w[f"{name}.reduction.weight"].T)


def position_bias(w: Weights, name: str, window: int, heads: int) -> Tensor:
    """Return 16 sigmoid(MLP(log-spaced distance)), [rows, columns of the query minus those of the
    key, heads]."""
    # in float32, as in timm
    distances = torch.arange(-(window - 1), window, dtype=torch.float32) / max(window - 1, 1) * 8
    spaced = (distances.sign() * torch.log2(distances.abs() + 1) / 3).double()
    pairs = torch.cartesian_prod(spaced, spaced).unflatten(0, (len(spaced), len(spaced)))
    hidden = (pairs @ w[f"{name}.cpb_mlp.0.weight"].T + w[f"{name}.cpb_mlp.0.bias"]).clamp(min=0)
    return 16 / (1 + torch.exp(-(hidden @ w[f"{name}.cpb_mlp.2.weight"].T)))


def window_groups(side: int, window: int, shift: int) -> list[list[tuple[int, int]]]:
    """Return groups of places that attend to each other: windows of the map moved by `shift`, cut
    at its border."""

    def cell(i: int) -> tuple[int, bool]:
        return (
            i - shift
        ) % side // window, i < shift  # places that have wrapped around are separate

    groups: dict[tuple, list[tuple[int, int]]] = {}
    for i in range(side):
        for j in range(side):
            groups.setdefault((cell(i), cell(j)), []).append((i, j))
    return list(groups.values())


def window_attention(
    w: Weights, name: str, x: Tensor, heads: int, window: int, shifted: bool
) -> Tensor:
    """Compute cosine attention of x [B, H, W, D] in windows, one group and one head at a time."""
    side, dim = x.shape[1], x.shape[-1]
    window, shift = (window, window // 2 if shifted else 0) if window < side else (side, 0)
    size = dim // heads
    bias = position_bias(w, name, window, heads)
    scale = torch.exp(w[f"{name}.logit_scale"].clamp(max=math.log(100)))
    nothing = torch.zeros_like(w[f"{name}.q_bias"])
    qkv = x @ w[f"{name}.qkv.weight"].T + torch.cat(
        [w[f"{name}.q_bias"], nothing, w[f"{name}.v_bias"]]
    )
    y = torch.zeros_like(x)
    for group in window_groups(side, window, shift):
        rows, columns = (torch.tensor(places) for places in zip(*group, strict=True))
        # the place within the window is the place in the moved map, modulo the window
        r, c = ((places - shift) % side % window for places in (rows, columns))
        down, right = r[:, None] - r + window - 1, c[:, None] - c + window - 1
        for h in range(heads):
            # [B, places, size]
            q, k, v = (
                qkv[:, rows, columns, i * dim + h * size : i * dim + (h + 1) * size]
                for i in range(3)
            )
            q, k = (t / (t**2).sum(-1, keepdim=True).sqrt() for t in (q, k))
            match = q @ k.transpose(1, 2) * scale[h] + bias[down, right, h]
            y[:, rows, columns, h * size : (h + 1) * size] = match.softmax(-1) @ v
    return linear(w, f"{name}.proj", y)


def swin(w: Weights, spec: SwinSpec, images: Tensor) -> SwinAnswer:
    modules: list[Routed] = []
    after_attention: list[Tensor] = []  # of the stage's blocks so far

    def add(name: str, h: Tensor, y: Tensor) -> Tensor:
        return h + layer_norm(w, f"{name}.after.norm", y)

    def add_attention(name: str, h: Tensor, stage: int, i: int) -> Tensor:
        heads = spec.heads * 2**stage
        return add(
            name,
            h,
            window_attention(w, f"{name}.f.attention", h, heads, spec.window, shifted=i % 2 == 1),
        )

    def add_mlp(name: str, h: Tensor) -> Tensor:
        return add(name, h, mlp(w, f"{name}.f", h))

    def moe_block(
        name: str, h_in: Tensor, stage: int, i: int, architecture: str, position: str, owner: str
    ) -> Tensor:
        """Compute layer i and, if every second layer has MoE, layer i + 1."""
        if spec.every == 2:
            h_mh = add_attention(f"{name}.sublayers.0", h_in, stage, i)
            h_mlp = add_mlp(f"{name}.sublayers.1", h_mh)
            h = add_attention(f"{name}.sublayers.2", h_mlp, stage, i + 1)
            taps = {"pos1": h_mlp, "pos2": h_mh, "pos3": h_in}
        else:
            h = add_attention(f"{name}.sublayers.0", h_in, stage, i)
            taps = {"pos1": h_in, "pos2": after_attention[-1] if after_attention else h}
        after_attention.append(h)

        def routed(x: Tensor, taken: list[int] | None = None) -> Routed:
            top_k = spec.top_k if stage == 2 else 2
            part = Spec(architecture, 1, 1, top_k=top_k, capacity_factor=spec.capacity_factor)
            result = routed_experts(w, f"{owner}.moe", x.flatten(0, 2), part, taken)
            return result._replace(y=result.y.view_as(x))

        if architecture == "top_k":  # Eq. 1
            modules.append(routed(h))
            return add(name, h, modules[-1].y)
        w_coefficient = w.get(f"{name}.coefficient.gate.weight")
        if architecture == "shared_expert":  # Eq. 6
            modules.append(routed(h))
            shared = mlp(w, f"{name}.shared_expert", h)
            return add(name, h, merge(spec.combine, w_coefficient, h, shared, modules[-1].y))
        tap = taps[position]
        if architecture in ("dgmoe", "dgmoe_share"):  # Eq. 23, A.7
            preceding = routed(tap)
            taken = [experts[0] for experts in preceding.chosen] if spec.distinct_experts else None
            current = routed(h, taken)
            modules.append(both(current, preceding))
            return add(name, h, modules[-1].y)
        assert architecture == "scmoe"  # Eq. 7-10
        modules.append(routed(tap))
        shared = mlp(w, f"{name}.shared_expert", h)
        read = tap if spec.coefficient_input == "tap" else h
        return add(name, h, merge(spec.combine, w_coefficient, read, shared, modules[-1].y))

    x = patches(w, images, spec.patch_size)
    for stage, depth in enumerate((2, 2, spec.layers, 2)):
        if stage:
            x = merge_patches(w, f"merges.{stage}", x)
        architecture = "dense" if stage < 2 else spec.architecture
        if stage == 3 and architecture != "dense":
            architecture = "top_k"
        after_attention.clear()
        for number, i in enumerate(range(0, depth, 1 if architecture == "dense" else spec.every)):
            name = f"stages.{stage}.{number}"
            if architecture == "dense":
                x = add_attention(f"{name}.sublayers.0", x, stage, i)
                x = add_mlp(f"{name}.sublayers.1", x)
                continue
            owner = f"stages.{stage}.{number // 2 * 2}" if architecture == "dgmoe_share" else name
            position = spec.first_position if number == 0 and spec.first_position else spec.position
            x = moe_block(name, x, stage, i, architecture, position, owner)
    logits = linear(w, "head", layer_norm(w, "norm", x).mean((1, 2)))
    if not modules:
        return SwinAnswer(logits, None, [])
    balance = sum(load_balance_loss(m.chosen, m.scores) for m in modules) / len(modules)
    return SwinAnswer(logits, balance, [m.dropped for m in modules])
