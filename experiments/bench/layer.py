"""The time of the MoE layer over that of the dense products that it contains, and over its roofline.

The roofline is the longer of two times: the dense products', and that of moving the experts' weights through memory at
the measured bandwidth, read once in each pass, their gradients written once. A dense product reads one expert's worth.

Variants run in turn, round after round, and ratios are taken within a round, since the machine's speed drifts.
"""

import time
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.training.run.machine import keep_freed_memory

WARM_UP = 2  # rounds
READ_BYTES = 1 << 30  # more than any cache holds
PRODUCTS, BATCHED, LAYER = "dense products", "batched products of the experts", "MoE layer"
KINDS = ((0, "forward"), (1, "train"))


class DenseProducts(nn.Module):
    """The layer's two products as dense ones on as many rows, with a module between them."""

    def __init__(self, dim: int, ffn_dim: int, between: nn.Module) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(dim, ffn_dim) * 0.02)
        self.w_out = nn.Parameter(torch.randn(ffn_dim, dim) * 0.02)
        self.between = between

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.between(rows_RD @ self.w_in) @ self.w_out


class BatchedProducts(nn.Module):
    """The experts' own products for equal numbers of rows, as two batched ones: what each expert's weights cost."""

    def __init__(self, dim: int, ffn_dim: int, experts: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(experts, dim, ffn_dim) * 0.02)
        self.w_out = nn.Parameter(torch.randn(experts, ffn_dim, dim) * 0.02)

    def forward(self, rows_RD: Tensor) -> Tensor:
        rows_eCD = rows_RD.unflatten(0, (len(self.w_in), -1))
        return torch.bmm(torch.bmm(rows_eCD, self.w_in), self.w_out).view_as(rows_RD)


def bench_layer(
    dim: int,
    ffn_dim: int,
    experts: int,
    tokens: int,
    top_k: int,
    rounds: int,
    threads: int,
    capacity: float | None = None,
) -> dict[str, Any]:
    """Return the layer's times, router to decode, over those of the two products and over the roofline; medians.

    capacity: the layer drops what is beyond a capacity factor, and is compared with the dropless layer too.
    """
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = Experts(dim, ffn_dim, experts)
    module.init_weights("bench", 0.02, 0.02)
    router = Router(dim, experts, top_k)
    x = torch.randn(1, tokens, dim, requires_grad=True)
    rows = torch.randn(tokens * top_k, dim, requires_grad=True)
    variants: dict[str, tuple[nn.Module, Tensor]] = {
        PRODUCTS: (DenseProducts(dim, ffn_dim, nn.Identity()), rows),
        "dense products with GELU": (DenseProducts(dim, ffn_dim, nn.GELU()), rows),
        LAYER: (MoEStream(router, module, LocalDispatcher(), capacity, filled=True), x),
    }
    if tokens * top_k % experts == 0:
        variants[BATCHED] = BatchedProducts(dim, ffn_dim, experts), rows
    if capacity is not None:
        variants["MoE layer, dropless"] = MoEStream(router, module, LocalDispatcher()), x
    if find_spec("transformers"):  # with three products an expert, of 2/3 of the width
        block = mixtral_block(dim, 2 * ffn_dim // 3 // 8 * 8, experts, top_k, "grouped_mm")
        variants["transformers, grouped, as many FLOPs"] = random_weights(block, x.device), x
    measured = [[(forward(*v), train(*v)) for v in variants.values()] for _ in range(WARM_UP + rounds)][WARM_UP:]
    times = dict(zip(variants, np.array(measured).transpose(1, 2, 0), strict=True))  # [forward and train, rounds]
    ratios = {name: np.median(times[LAYER] / own, axis=-1) for name, own in times.items()}
    bandwidth = read_bytes_per_s()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    moved = np.array([[weights], [3 * weights]]) / bandwidth  # weights read in each pass, gradients written
    roofline = np.median(times[LAYER] / np.maximum(times[PRODUCTS], moved), axis=-1)

    sizes = f"D={dim} F={ffn_dim} E={experts}, {tokens} tokens, top-{top_k}, capacity factor {capacity or 'none'}"
    title = f"MoE layer, {sizes}, {threads} thread(s), medians of {rounds} rounds"
    columns = ("forward ms", "forward + backward ms", "MoE layer over it: forward", "forward + backward")
    numbers = (Column(name, justify="right") for name in columns)
    table = Table("variant", *numbers, title=title, title_justify="left")
    for name, own in times.items():
        ms = [f"{value * 1e3:.1f}" for value in np.median(own, axis=-1)]
        table.add_row(name, *ms, *(f"{ratio:.3f}" for ratio in ratios[name]))
    limit = [f"{value * 1e3:.1f}" for value in np.median(np.maximum(times[PRODUCTS], moved), axis=-1)]
    table.add_row(f"roofline, {bandwidth / 1e9:.1f} GB/s", *limit, *(f"{ratio:.3f}" for ratio in roofline))
    Console(stderr=True, width=120).print(table)
    names = {
        PRODUCTS: "",
        BATCHED: "_over_batched",
        "dense products with GELU": "_with_gelu",
        "MoE layer, dropless": "_over_dropless",
    }
    found = {f"{kind}_ratio{names[name]}": ratios[name][i] for name in ratios if name in names for i, kind in KINDS}
    found |= {"roofline_ratio": roofline[1], "roofline_ratio_forward": roofline[0], "gb_per_s": bandwidth / 1e9}
    return {name: float(value) for name, value in found.items()}


def read_bytes_per_s() -> float:
    """Return the bandwidth of this process's threads when they read numbers that are in no cache; the best of five."""
    numbers = torch.ones(READ_BYTES // 4)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return READ_BYTES / min(seconds)


def mixtral_block(dim: int, ffn_dim: int, num_experts: int, top_k: int, implementation: str) -> nn.Module:
    """Return transformers' block on the meta device. implementation: how it computes its experts."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    sizes: dict[str, Any] = dict(hidden_size=dim, intermediate_size=ffn_dim, num_local_experts=num_experts)
    how: dict[str, Any] = dict(num_experts_per_tok=top_k, hidden_act="silu", experts_implementation=implementation)
    with torch.device("meta"):
        return MixtralSparseMoeBlock(MixtralConfig(**sizes, **how))


@torch.no_grad()
def random_weights(module: Any, device: torch.device) -> Any:
    """Return the module on the device with weights that are drawn there, which is faster than on the host."""
    module = module.to_empty(device=device)
    for p in module.parameters():
        p.normal_(std=0.02)
    return module


@torch.no_grad()
def forward(module: nn.Module, x: Tensor) -> float:
    """Return the seconds of a forward pass."""
    start = time.perf_counter()
    module(x)
    return time.perf_counter() - start


def train(module: nn.Module, x: Tensor) -> float:
    """Return the seconds of forward and backward, into gradients that do not exist yet, as after zero_grad()."""
    module.zero_grad()
    x.grad = None
    start = time.perf_counter()
    out = module(x)
    y = out if isinstance(out, Tensor) else out.y_BSD
    y.backward(torch.ones_like(y))
    return time.perf_counter() - start
