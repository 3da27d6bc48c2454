"""`python -m experiments.bench layer`: the MoE layer against the dense products that it cannot do without.

Variants run in turn, round after round, and the figures are medians of each round's ratios: this machine's speed
drifts, and two runs must not be compared. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench layer", description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--ffn-dim", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    result = layer(parser.parse_args(arguments))
    print(json.dumps(result))
    return 0


class DenseProducts(nn.Module):
    """The layer's two products on as many rows, as two dense ones; `activation` puts its GELU between them."""

    def __init__(self, dim: int, ffn_dim: int, activation: bool) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(dim, ffn_dim) * 0.02)
        self.w_out = nn.Parameter(torch.randn(ffn_dim, dim) * 0.02)
        self.between: Callable[[Tensor], Tensor] = nn.GELU() if activation else nn.Identity()

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.between(rows_RD @ self.w_in) @ self.w_out


def layer(options: argparse.Namespace) -> dict[str, object]:
    """forward_ratio, train_ratio: the whole dropless layer, router to decode, over the two bare products."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dim, ffn_dim, num_tokens = options.dim, options.ffn_dim, options.tokens
    experts = Experts(dim, ffn_dim, options.experts)
    experts.init_weights("bench", 0.02, 0.02)
    moe = MoEStream(Router(dim, options.experts, options.top_k), experts, LocalDispatcher())
    tokens = torch.randn(1, num_tokens, dim, requires_grad=True)
    rows = torch.randn(num_tokens * options.top_k, dim, requires_grad=True)
    variants: dict[str, tuple[nn.Module, Tensor]] = {
        "dense products": (DenseProducts(dim, ffn_dim, activation=False), rows),
        "dense products with GELU": (DenseProducts(dim, ffn_dim, activation=True), rows),
        "MoE layer": (moe, tokens),
    }
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "train": []} for name in variants}
    for round_ in range(-2, options.rounds):  # two rounds of warm-up
        for name, (module, x) in variants.items():
            for kind in ("forward", "train"):
                seconds = forward(module, x) if kind == "forward" else train(module, x)
                if round_ >= 0:
                    times[name][kind].append(seconds)

    def ratio(kind: str, of: str) -> float:
        pairs = zip(times["MoE layer"][kind], times[of][kind], strict=True)
        return statistics.median(a / b for a, b in pairs)

    sizes = f"D={dim} F={ffn_dim} E={options.experts}, {num_tokens} tokens, top-{options.top_k}"
    title = f"MoE layer, {sizes}, {options.threads} thread(s), medians of {options.rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in (
        "variant",
        "forward ms",
        "forward + backward ms",
        "MoE layer over it: forward",
        "forward + backward",
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, measured in times.items():
        ms = [f"{statistics.median(measured[kind]) * 1e3:.1f}" for kind in ("forward", "train")]
        table.add_row(name, *ms, *(f"{ratio(kind, name):.3f}" for kind in ("forward", "train")))
    Console(width=120).print(table)
    return {
        "forward_ratio": ratio("forward", "dense products"),
        "train_ratio": ratio("train", "dense products"),
        "forward_ratio_with_gelu": ratio("forward", "dense products with GELU"),
        "train_ratio_with_gelu": ratio("train", "dense products with GELU"),
        **vars(options),
    }


@torch.no_grad()
def forward(module: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    module(x)
    return time.perf_counter() - start


def train(module: nn.Module, x: Tensor) -> float:
    """Forward and backward into gradients that do not exist yet, as after zero_grad()."""
    module.zero_grad()
    x.grad = None
    start = time.perf_counter()
    out = module(x)
    y = out if isinstance(out, Tensor) else out.y_BSD
    y.backward(torch.ones_like(y))
    return time.perf_counter() - start
