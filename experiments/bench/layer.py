"""The time of the MoE layer over that of the dense products that it contains, on this machine and
on one GPU.

The roofline is the longer of two times: that of the dense products, and that of moving the experts'
weights through memory at the measured bandwidth. Weights are read once in each pass and their
gradients are written once. A dense product reads as many weights as one expert has.

The part `layer` of `make gpu-check` (on_device) has the layer in float32 and bfloat16, with 8 and
64 experts:

    fixed capacity   over two batched products on as many rows
    dropless         over two grouped products on as many rows
    transformers     its Mixtral block and our dropless layer, both SwiGLU, of the same shapes and
                     so of equal FLOPs

There the products have no activation between them. Tokens are dealt to the experts in turn, so
every expert has as many rows as in the products; beside transformers an untrained gate chooses.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.bench.other_settings import LayerSetting
from experiments.engine.isolated import Pieces, Place, attempt
from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.experts import Activation, Experts, batched_mlps, grouped_mlps
from scmoe.moe.layout import choose_rows
from scmoe.moe.router import Router, round_robin
from scmoe.moe.stream import MoEStream
from scmoe.planning.clock import CPU, in_turn, median, seconds
from scmoe.report import Report
from scmoe.training.run.machine import keep_freed_memory

Made = tuple[nn.Module, Tensor]  # a module and its input
WARM_UP_ROUNDS, WARM_UP_ON_DEVICE = 2, 3  # rounds
READ_BYTES = 1 << 30  # more than any cache holds
TOP_K_ON_DEVICE = 2  # on a device
NO_ACTIVATION = Activation(
    lambda h: h, lambda h, out: out.copy_(h), lambda da, h, out: out.copy_(da)
)
PRODUCTS = "dense products"
GELU = "dense products with GELU"
BATCHED = "batched products of the experts"
LAYER = "MoE layer"
DROPLESS = "MoE layer, dropless"
RATIO_SUFFIXES = {  # of the names of ratios in JSON
    PRODUCTS: "",
    BATCHED: "_over_batched",
    GELU: "_with_gelu",
    DROPLESS: "_over_dropless",
}


class DenseProducts(nn.Module):
    """The layer's two products as dense ones on as many rows, with a module between them."""

    def __init__(self, dim: int, ffn_dim: int, between: nn.Module) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(dim, ffn_dim) * 0.02)
        self.w_out = nn.Parameter(torch.randn(ffn_dim, dim) * 0.02)
        self.between = between

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.between(rows_RD @ self.w_in) @ self.w_out


class ExpertProducts(nn.Module):
    """The two products of every expert on rows of equal numbers.

    mlps: batched_mlps or grouped_mlps.
    """

    def __init__(
        self, experts: Experts, mlps: Callable[..., Tensor], counts_E: Tensor | None = None
    ) -> None:
        super().__init__()
        self.experts = experts
        self.mlps = mlps
        self.counts_E = counts_E

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.mlps(
            rows_RD, self.experts.w_in_eDF, self.experts.w_out_eFD, self.counts_E, NO_ACTIVATION
        )


def bench_layer(setting: LayerSetting) -> dict[str, Any]:
    """Return the layer's times, router to decode, over those of the two products and over the
    roofline; medians.

    With a capacity factor the layer drops what is beyond it, and is compared with the dropless
    layer too.
    """
    keep_freed_memory()
    dim, ffn_dim = setting.dim, setting.ffn_dim
    tokens, top_k = setting.tokens, setting.top_k
    experts, capacity = setting.experts, setting.capacity
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    module = Experts(dim, ffn_dim, experts)
    module.init_weights("bench", 0.02, 0.02)
    router = Router(dim, experts, top_k)
    x = torch.randn(1, tokens, dim, requires_grad=True)
    rows = torch.randn(tokens * top_k, dim, requires_grad=True)
    variants: dict[str, Made] = {
        PRODUCTS: (DenseProducts(dim, ffn_dim, nn.Identity()), rows),
        GELU: (DenseProducts(dim, ffn_dim, nn.GELU()), rows),
        LAYER: (
            MoEStream(router, module, LocalDispatcher(), choose_rows(capacity, filled=True)),
            x,
        ),
    }
    if tokens * top_k % experts == 0:
        variants[BATCHED] = (
            ExpertProducts(random_weights(Experts(dim, ffn_dim, experts), CPU), batched_mlps),
            rows,
        )
    if capacity is not None:
        variants[DROPLESS] = MoEStream(router, module, LocalDispatcher()), x
    if find_spec("transformers"):  # with three products an expert, of 2/3 of the width
        block = mixtral_block(dim, 2 * ffn_dim // 3 // 8 * 8, experts, top_k, "grouped_mm")
        variants["transformers, grouped, as many FLOPs"] = random_weights(block, x.device), x
    times = in_turn(
        {name: forward_and_train(*variant) for name, variant in variants.items()},
        setting.rounds,
        WARM_UP_ROUNDS,
    )
    bandwidth = read_bytes_per_s()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    # weights are read in each pass, gradients written
    moved = np.array([[weights], [3 * weights]]) / bandwidth
    roofline = f"roofline, {bandwidth / 1e9:.1f} GB/s"
    times[roofline] = np.maximum(times[PRODUCTS], moved)
    # forward, train
    ms = {name: [1e3 * median(kind) for kind in both] for name, both in times.items()}
    ratios = {name: [median(kind) for kind in times[LAYER] / both] for name, both in times.items()}

    sizes = (
        f"D={dim} F={ffn_dim} E={experts}, {tokens} tokens, top-{top_k}, capacity factor"
        f" {capacity or 'none'}"
    )
    columns = {
        "forward ms": "{ms[0]:.1f}",
        "forward + backward ms": "{ms[1]:.1f}",
        "MoE layer over it: forward": "{ratio[0]:.3f}",
        "forward + backward": "{ratio[1]:.3f}",
    }
    shown = {name: {"ms": ms[name], "ratio": ratios[name]} for name in times}
    Report(
        f"MoE layer, {sizes}, {setting.threads} thread(s), medians of {setting.rounds} rounds",
        shown,
        columns,
        "variant",
    ).show()
    summary: dict[str, Any] = {}
    for name, key in RATIO_SUFFIXES.items():
        if name in ratios:
            summary[f"forward_ratio{key}"], summary[f"train_ratio{key}"] = ratios[name]
    summary["roofline_ratio_forward"], summary["roofline_ratio"] = ratios[roofline]
    return {**summary, "gb_per_s": bandwidth / 1e9, "setting": asdict(setting)}


def read_bytes_per_s() -> float:
    """Return the bandwidth of this process's threads when they read numbers that are in no cache;
    the best of five."""
    numbers = torch.ones(READ_BYTES // 4)
    return READ_BYTES / min(seconds(numbers.sum) for _ in range(5))


def mixtral_block(
    dim: int, ffn_dim: int, num_experts: int, top_k: int, implementation: str
) -> nn.Module:
    """Return transformers' block on the meta device.

    implementation: how it computes its experts.
    """
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    sizes: dict[str, Any] = dict(
        hidden_size=dim, intermediate_size=ffn_dim, num_local_experts=num_experts
    )
    how: dict[str, Any] = dict(
        num_experts_per_tok=top_k, hidden_act="silu", experts_implementation=implementation
    )
    with torch.device("meta"):
        return MixtralSparseMoeBlock(MixtralConfig(**sizes, **how))


@torch.no_grad()
def random_weights(module: Any, device: torch.device) -> Any:
    """Return the module on the device with weights that are drawn there, which is faster than on
    the host."""
    module = module.to_empty(device=device)
    for p in module.parameters():
        p.normal_(std=0.02)
    return module


def forward_and_train(
    module: nn.Module, x: Tensor, device: torch.device = CPU
) -> Callable[[], tuple[float, float]]:
    """Return a function that times a forward pass without gradients, and one with backward into
    gradients that do not exist yet, as after zero_grad(). It returns seconds."""

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


def compare(
    device: torch.device,
    variants: Mapping[str, Callable[[], Made]],
    over: Mapping[str, str],
    rounds: int,
) -> dict[str, Any]:
    """Return for each variant its median forward_ms and train_ms, and its ratios to the variant
    that `over` names.

    variants: functions that make a module and its input. One that cannot be made or run has its
    error instead.
    """

    def first(make: Callable[[], Made]) -> Callable[[], Any]:
        run = forward_and_train(*make(), device)
        run()
        return run

    results = {name: attempt(partial(first, make)) for name, make in variants.items()}
    runs = {name: run for name, run in results.items() if callable(run)}
    times = in_turn(runs, rounds, WARM_UP_ON_DEVICE)
    for name, (forward, train) in times.items():
        results[name] = {"forward_ms": 1e3 * median(forward), "train_ms": 1e3 * median(train)}
    for name, other in over.items():
        if name in times and other in times:
            forward, train = times[name] / times[other]
            results[name] |= {
                "over": other,
                "forward_ratio": median(forward),
                "train_ratio": median(train),
            }
    return results


def on_device(place: Place) -> Pieces:
    sizes = (
        dict(dim=32, ffn_dim=96, tokens=64)
        if place.tiny
        else dict(dim=1024, ffn_dim=4096, tokens=8192)
    )
    rounds = 3 if place.tiny else 15
    device = torch.device(place.device)
    cells: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for num_experts in (8, 64):
            cell = partial(measure, device, dtype, num_experts, rounds, **sizes)
            cells[f"{str(dtype).removeprefix('torch.')}, {num_experts} experts"] = cell
    return cells


def measure(
    device: torch.device,
    dtype: torch.dtype,
    num_experts: int,
    rounds: int,
    dim: int,
    ffn_dim: int,
    tokens: int,
) -> dict[str, Any]:
    """Return times and ratios of all variants. SwiGLU has three products, so its hidden width is
    2/3 of ffn_dim."""
    narrow = 2 * ffn_dim // 3 // 8 * 8

    def x() -> Tensor:
        return torch.randn(1, tokens, dim, device=device, dtype=dtype, requires_grad=True)

    def experts(activation: str = "gelu", width: int = ffn_dim) -> Experts:
        with torch.device("meta"):
            module = Experts(dim, width, num_experts, activation=activation)
        return random_weights(module.to(dtype), device)

    def products(mlps: Callable[..., Tensor], counts_E: Tensor | None) -> Made:
        rows = torch.randn(
            tokens * TOP_K_ON_DEVICE, dim, device=device, dtype=dtype, requires_grad=True
        )
        return ExpertProducts(experts(), mlps, counts_E), rows

    def layer(module: Experts, capacity_factor: float | None, balanced: bool) -> Made:
        deal = round_robin(num_experts, TOP_K_ON_DEVICE) if balanced else None
        router = random_weights(
            Router(dim, num_experts, TOP_K_ON_DEVICE, deal=deal).to(dtype), device
        )
        return MoEStream(router, module, LocalDispatcher(), choose_rows(capacity_factor)), x()

    def mixtral(implementation: str) -> Made:
        block = mixtral_block(dim, narrow, num_experts, TOP_K_ON_DEVICE, implementation)
        return random_weights(block.to(dtype), device), x()

    each = torch.full((num_experts,), tokens * TOP_K_ON_DEVICE // num_experts, device=device)
    variants: dict[str, Callable[[], Made]] = {
        "products, batched": lambda: products(batched_mlps, None),
        "products, grouped": lambda: products(grouped_mlps, each),
        "layer, fixed capacity": lambda: layer(experts(), 1.0, balanced=True),
        "layer, dropless": lambda: layer(experts(), None, balanced=True),
        "layer, dropless, SwiGLU": lambda: layer(experts("swiglu", narrow), None, balanced=False),
    }
    over = {"layer, fixed capacity": "products, batched", "layer, dropless": "products, grouped"}
    sizes: dict[str, Any] = {
        "tokens": tokens,
        "top_k": TOP_K_ON_DEVICE,
        "dim": dim,
        "ffn_dim": ffn_dim,
    }
    if find_spec("transformers") is None:
        sizes["transformers"] = "not compared: transformers is missing"
    else:
        for implementation in ("eager", "grouped_mm"):
            name = f"transformers' Mixtral block, {implementation}"
            variants[name], over[name] = partial(mixtral, implementation), "layer, dropless, SwiGLU"
    return {**sizes, "variants": compare(device, variants, over, rounds)}
