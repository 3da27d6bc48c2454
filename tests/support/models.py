"""This module makes tiny models, layers and batches, and compares tensors.

The weights are chosen so that every term of the mathematics shows in the result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.distributed.fake_pg import FakeStore

from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.config.fields import Config
from scmoe.moe.coefficient import CG1
from scmoe.moe.dispatcher import Dispatcher, LocalDispatcher
from scmoe.moe.experts import Experts
from scmoe.moe.layout import choose_rows
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import Mesh
from scmoe.parallel.wire.wire import Wire
from scmoe.schedule.schedule import Schedule
from scmoe.training.assembly.model import build_model

TINY = (
    "model.layers=2",
    "model.dim=16",
    "model.heads=2",
    "model.ffn_dim=24",
    "moe.num_experts=6",
    "data.name=synthetic",
    "data.vocab_size=64",
    "data.seq_len=12",
)


@cache
def tiny(*overrides: str) -> Config:
    from scmoe.config.load import load_config  # here, so that the `gpu` tests run without omegaconf

    return load_config(None, [*TINY, *overrides])


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set weights so that every term shows: no bias is 0, no norm weight is 1, experts and gates
    differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        fresh = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if "norm.weight" in name:
            p.copy_(1 + 0.3 * fresh)
        else:
            p.copy_(fresh * (0.3 if p.dim() > 1 else 0.1))
    return module


def tiny_model(config: Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    return randomise(build_model(config).to(dtype), seed)


def tiny_batch(config: Config, batch_size: int = 2) -> tuple[Tensor, Tensor]:
    """Return input ids and labels [B, S]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        config.data.vocab_size, (batch_size, config.data.seq_len + 1), generator=generator
    )
    return ids[:, :-1], ids[:, 1:]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient. AssertionError: a parameter has none."""
    trained = {
        name: p for name, p in module.named_parameters() if p.requires_grad
    }  # no selection biases
    missing = [name for name, p in trained.items() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: p.grad.clone() for name, p in trained.items()}


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Yield a dict that has, after the end, the bytes of each storage that autograd keeps; no
    weights, no buffers."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        yield kept
    for t in (*model.parameters(), *model.buffers()):
        kept.pop(t.untyped_storage().data_ptr(), None)


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float = 1e-12, what: str = ""
) -> None:
    """Allow a difference of tolerance times the largest expected entry, or of tolerance if all
    entries are below 1."""
    assert actual.shape == expected.shape, what
    if actual.numel():
        error = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        assert error <= tolerance, f"{what}: differs by {error:.1e}, allowed {tolerance:.0e}"


DIM, FFN, EXPERTS = 16, 24, 6


def tiny_stream(
    top_k: int = 2,
    capacity_factor: float | None = None,
    dispatcher: Dispatcher | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> MoEStream:
    router, experts = Router(DIM, EXPERTS, top_k), Experts(DIM, FFN, EXPERTS)
    stream = MoEStream(
        router, experts, dispatcher or LocalDispatcher(), choose_rows(capacity_factor)
    )
    return randomise(stream.to(dtype), seed)


def tiny_sublayers() -> list[nn.Module]:
    """Return the sublayers of a pair: attention, MLP, attention."""
    return [
        Residual(nn.LayerNorm(DIM), part)
        for part in (Attention(DIM, 2), MLP(DIM, FFN), Attention(DIM, 2))
    ]


def tiny_shortcut(
    stream: MoEStream,
    schedule: Schedule,
    sublayers: list[nn.Module] | None = None,
    shared_expert: nn.Module | None = None,
) -> ShortcutBlock:
    """Return a ScMoE pair with CG-1."""
    parts = {
        "tap_norm": nn.LayerNorm(DIM),
        "shared_expert": shared_expert or MLP(DIM, FFN),
        "coefficient": CG1(DIM),
    }
    return ShortcutBlock(
        sublayers or tiny_sublayers(), nn.LayerNorm(DIM), stream, schedule, **parts
    )


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@contextmanager
def one_of_two() -> Iterator[Wire]:
    """Give the wire of rank 1 of two ranks that do not exist and share the experts."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield Wire(Mesh(1, 2, 2, ep_group=dist.group.WORLD))
    finally:
        dist.destroy_process_group()
