"""Part layer: the MoE layer in float32 and bfloat16, with 8 and 64 experts, over the dense products that it contains.

    fixed capacity   over two batched products on as many rows
    dropless         over two grouped products on as many rows
    transformers     its Mixtral block and our dropless layer, both SwiGLU, of the same shapes and so of equal FLOPs

The products have no activation between them. Tokens are dealt to the experts in turn, so every expert has as many rows
as in the products; beside transformers an untrained gate chooses.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from scmoe.experiments.bench.gpu.gpu_parts import Pieces, Place
from scmoe.experiments.bench.gpu.timing import Made, compare
from scmoe.experiments.bench.layer import mixtral_block, random_weights
from scmoe.moe.activation import Activation
from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.experts import Experts, batched_mlps, grouped_mlps
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream

TOP_K = 2
NO_ACTIVATION = Activation(lambda h: h, lambda h: h, lambda h, out: out.copy_(h), lambda da, h, out: out.copy_(da))


class Products(nn.Module):
    """The two products of every expert on rows of equal numbers. way: batched_mlps or grouped_mlps."""

    def __init__(self, experts: Experts, way: Callable[..., Tensor], counts_E: Tensor | None) -> None:
        super().__init__()
        self.experts, self.way, self.counts_E = experts, way, counts_E

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.way(rows_RD, self.experts.w_in_eDF, self.experts.w_out_eFD, self.counts_E, NO_ACTIVATION)


def pieces(place: Place) -> Pieces:
    sizes = dict(dim=32, ffn_dim=96, tokens=64) if place.tiny else dict(dim=1024, ffn_dim=4096, tokens=8192)
    rounds = 3 if place.tiny else 15
    found: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for num_experts in (8, 64):
            cell = partial(measure, place.torch_device, dtype, num_experts, rounds, **sizes)
            found[f"{str(dtype).removeprefix('torch.')}, {num_experts} experts"] = cell
    return found


def measure(
    device: torch.device, dtype: torch.dtype, num_experts: int, rounds: int, dim: int, ffn_dim: int, tokens: int
) -> dict[str, Any]:
    """Returns times and ratios of all variants. SwiGLU has three products, so its hidden width is 2/3 of ffn_dim."""

    narrow = 2 * ffn_dim // 3 // 8 * 8

    def experts(activation: str = "gelu", width: int = ffn_dim) -> Experts:
        with torch.device("meta"):
            module = Experts(dim, width, num_experts, activation=activation)
        return random_weights(module.to(dtype), device)

    def products(way: Callable[..., Tensor], counts_E: Tensor | None) -> Made:
        rows = torch.randn(tokens * TOP_K, dim, device=device, dtype=dtype, requires_grad=True)
        return Products(experts(), way, counts_E), rows

    def layer(capacity_factor: float | None) -> Made:
        router = random_weights(Router(dim, num_experts, TOP_K, balanced=True).to(dtype), device)
        return MoEStream(router, experts(), LocalDispatcher(), capacity_factor), tokens_of(device, dtype, tokens, dim)

    def swiglu() -> Made:
        router = random_weights(Router(dim, num_experts, TOP_K).to(dtype), device)
        stream = MoEStream(router, experts("swiglu", narrow), LocalDispatcher())
        return stream, tokens_of(device, dtype, tokens, dim)

    def mixtral(implementation: str) -> Made:
        block = mixtral_block(dim, narrow, num_experts, TOP_K, implementation)
        return random_weights(block.to(dtype), device), tokens_of(device, dtype, tokens, dim)

    each = torch.full((num_experts,), tokens * TOP_K // num_experts, device=device)
    variants: dict[str, Callable[[], Made]] = {
        "products, batched": lambda: products(batched_mlps, None),
        "products, grouped": lambda: products(grouped_mlps, each),
        "layer, fixed capacity": lambda: layer(1.0),
        "layer, dropless": lambda: layer(None),
        "layer, dropless, SwiGLU": swiglu,
    }
    over = {"layer, fixed capacity": "products, batched", "layer, dropless": "products, grouped"}
    sizes: dict[str, Any] = {"tokens": tokens, "top_k": TOP_K, "dim": dim, "ffn_dim": ffn_dim}
    if find_spec("transformers") is None:
        sizes["transformers"] = "not compared: transformers is missing"
    else:
        for implementation in ("eager", "grouped_mm"):
            name = f"transformers' Mixtral block, {implementation}"
            variants[name], over[name] = partial(mixtral, implementation), "layer, dropless, SwiGLU"
    return {**sizes, "variants": compare(device, variants, over, rounds)}


def tokens_of(device: torch.device, dtype: torch.dtype, tokens: int, dim: int) -> Tensor:
    return torch.randn(1, tokens, dim, device=device, dtype=dtype, requires_grad=True)
