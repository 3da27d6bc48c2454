"""The time of the MoE layer over that of the dense products that it contains.

Variants run in turn, round after round, and ratios are taken within a round, since the machine's speed drifts.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream


class DenseProducts(nn.Module):
    """The layer's two products as dense ones on as many rows; `activation` puts the GELU between them."""

    def __init__(self, dim: int, ffn_dim: int, activation: bool) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(dim, ffn_dim) * 0.02)
        self.w_out = nn.Parameter(torch.randn(ffn_dim, dim) * 0.02)
        self.between: Callable[[Tensor], Tensor] = nn.GELU() if activation else nn.Identity()

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
        "dense products": (DenseProducts(dim, ffn_dim, activation=False), rows),
        "dense products with GELU": (DenseProducts(dim, ffn_dim, activation=True), rows),
        "MoE layer": (moe, x),
    }
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "train": []} for name in variants}
    for round_ in range(-2, rounds):  # two rounds of warm-up
        for name, (variant, given) in variants.items():
            for kind, measure in (("forward", forward), ("train", train)):
                seconds = measure(variant, given)
                if round_ >= 0:
                    times[name][kind].append(seconds)

    def ratio(kind: str, of: str) -> float:
        pairs = zip(times["MoE layer"][kind], times[of][kind], strict=True)
        return statistics.median(a / b for a, b in pairs)

    sizes = f"D={dim} F={ffn_dim} E={experts}, {tokens} tokens, top-{top_k}"
    title = f"MoE layer, {sizes}, {threads} thread(s), medians of {rounds} rounds"
    table = Table("variant", title=title, title_justify="left")
    for column in ("forward ms", "forward + backward ms", "MoE layer over it: forward", "forward + backward"):
        table.add_column(column, justify="right")
    for name, measured in times.items():
        ms = [f"{statistics.median(measured[kind]) * 1e3:.1f}" for kind in ("forward", "train")]
        table.add_row(name, *ms, *(f"{ratio(kind, name):.3f}" for kind in ("forward", "train")))
    Console(width=120).print(table)
    over = {"_ratio": "dense products", "_ratio_with_gelu": "dense products with GELU"}
    return {f"{kind}{word}": ratio(kind, name) for word, name in over.items() for kind in ("forward", "train")}


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
