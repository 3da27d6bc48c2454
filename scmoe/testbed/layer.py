"""The time of the MoE layer over that of the dense products that it contains.

Variants run in turn, round after round, and ratios are taken within a round, since the machine's speed drifts.
"""

import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream

WARM_UP = 2  # rounds


class DenseProducts(nn.Module):
    """The layer's two products as dense ones on as many rows, with a module between them."""

    def __init__(self, dim: int, ffn_dim: int, between: nn.Module) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(dim, ffn_dim) * 0.02)
        self.w_out = nn.Parameter(torch.randn(ffn_dim, dim) * 0.02)
        self.between = between

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.between(rows_RD @ self.w_in) @ self.w_out


def bench_layer(
    dim: int, ffn_dim: int, experts: int, tokens: int, top_k: int, rounds: int, threads: int
) -> dict[str, float]:
    """Return forward_ratio and train_ratio: the dropless layer, router to decode, over the two products; medians."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = Experts(dim, ffn_dim, experts)
    module.init_weights("bench", 0.02, 0.02)
    moe = MoEStream(Router(dim, experts, top_k), module, LocalDispatcher())
    x = torch.randn(1, tokens, dim, requires_grad=True)
    rows = torch.randn(tokens * top_k, dim, requires_grad=True)
    variants: dict[str, tuple[nn.Module, Tensor]] = {
        "dense products": (DenseProducts(dim, ffn_dim, nn.Identity()), rows),
        "dense products with GELU": (DenseProducts(dim, ffn_dim, nn.GELU()), rows),
        "MoE layer": (moe, x),
    }
    measured = [[(forward(*v), train(*v)) for v in variants.values()] for _ in range(WARM_UP + rounds)][WARM_UP:]
    times = dict(zip(variants, np.array(measured).transpose(1, 2, 0), strict=True))  # [forward and train, rounds]
    ratios = {name: np.median(times["MoE layer"] / own, axis=-1) for name, own in times.items()}

    sizes = f"D={dim} F={ffn_dim} E={experts}, {tokens} tokens, top-{top_k}"
    title = f"MoE layer, {sizes}, {threads} thread(s), medians of {rounds} rounds"
    columns = ("forward ms", "forward + backward ms", "MoE layer over it: forward", "forward + backward")
    numbers = (Column(name, justify="right") for name in columns)
    table = Table("variant", *numbers, title=title, title_justify="left")
    for name, own in times.items():
        ms = [f"{value * 1e3:.1f}" for value in np.median(own, axis=-1)]
        table.add_row(name, *ms, *(f"{ratio:.3f}" for ratio in ratios[name]))
    Console(width=120).print(table)
    names = ("forward_ratio", "train_ratio", "forward_ratio_with_gelu", "train_ratio_with_gelu")
    return dict(zip(names, [*ratios["dense products"], *ratios["dense products with GELU"]], strict=True))


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
