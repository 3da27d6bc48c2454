"""The time of the MoE layer over that of the dense products that it contains, and over its roofline.

The roofline is the longer of two times: the dense products', and that of moving the experts' weights through memory at
the measured bandwidth, read once in each pass, their gradients written once. A dense product reads one expert's worth.

Variants run in turn, round after round, and ratios are taken within a round, since the machine's speed drifts.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scmoe.experiments.engine.clock import CPU, in_turn, seconds
from scmoe.experiments.engine.report import Report
from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.training.run.host_memory import keep_freed_memory

WARM_UP = 2  # rounds
READ_BYTES = 1 << 30  # more than any cache holds
PRODUCTS, BATCHED, LAYER = "dense products", "batched products of the experts", "MoE layer"
GELU, DROPLESS = "dense products with GELU", "MoE layer, dropless"
KEYS = {PRODUCTS: "", BATCHED: "_over_batched", GELU: "_with_gelu", DROPLESS: "_over_dropless"}  # of ratios, as JSON


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
        GELU: (DenseProducts(dim, ffn_dim, nn.GELU()), rows),
        LAYER: (MoEStream(router, module, LocalDispatcher(), capacity, filled=True), x),
    }
    if tokens * top_k % experts == 0:
        variants[BATCHED] = BatchedProducts(dim, ffn_dim, experts), rows
    if capacity is not None:
        variants[DROPLESS] = MoEStream(router, module, LocalDispatcher()), x
    if find_spec("transformers"):  # with three products an expert, of 2/3 of the width
        block = mixtral_block(dim, 2 * ffn_dim // 3 // 8 * 8, experts, top_k, "grouped_mm")
        variants["transformers, grouped, as many FLOPs"] = random_weights(block, x.device), x
    times = in_turn({name: forward_and_train(*variant) for name, variant in variants.items()}, rounds, WARM_UP)
    bandwidth = read_bytes_per_s()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    moved = np.array([[weights], [3 * weights]]) / bandwidth  # weights read in each pass, gradients written
    roofline = f"roofline, {bandwidth / 1e9:.1f} GB/s"
    times[roofline] = np.maximum(times[PRODUCTS], moved)
    ms = {name: 1e3 * np.median(own, axis=-1) for name, own in times.items()}  # forward, train
    ratios = {name: np.median(times[LAYER] / own, axis=-1) for name, own in times.items()}

    sizes = f"D={dim} F={ffn_dim} E={experts}, {tokens} tokens, top-{top_k}, capacity factor {capacity or 'none'}"
    columns = {
        "forward ms": "{ms[0]:.1f}",
        "forward + backward ms": "{ms[1]:.1f}",
        "MoE layer over it: forward": "{ratio[0]:.3f}",
        "forward + backward": "{ratio[1]:.3f}",
    }
    rows = {name: {"ms": ms[name], "ratio": ratios[name]} for name in times}
    Report(f"MoE layer, {sizes}, {threads} thread(s), medians of {rounds} rounds", rows, columns, "variant").show()
    found: dict[str, Any] = {}
    for name, key in KEYS.items():
        if name in ratios:
            found[f"forward_ratio{key}"], found[f"train_ratio{key}"] = ratios[name].tolist()
    found["roofline_ratio_forward"], found["roofline_ratio"] = ratios[roofline].tolist()
    return {**found, "gb_per_s": bandwidth / 1e9}


def read_bytes_per_s() -> float:
    """Return the bandwidth of this process's threads when they read numbers that are in no cache; the best of five."""
    numbers = torch.ones(READ_BYTES // 4)
    return READ_BYTES / min(seconds(numbers.sum) for _ in range(5))


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


def forward_and_train(module: nn.Module, x: Tensor, device: torch.device = CPU) -> Callable[[], tuple[float, float]]:
    """Return what gives the seconds of a forward pass without gradients, and of one with backward into gradients that
    do not exist yet, as after zero_grad()."""

    def output() -> Tensor:
        out = module(x)
        return out if isinstance(out, Tensor) else out.y_BSD

    def train() -> None:
        y = output()
        y.backward(torch.ones_like(y))

    def both() -> tuple[float, float]:
        with torch.no_grad():
            forward = seconds(output, device)
        module.zero_grad()
        x.grad = None
        return forward, seconds(train, device)

    return both
