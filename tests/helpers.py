"""Tiny models, and dispatchers and modules that log what happens to them forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import Function

from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.config import Config, load
from scmoe.moe.coefficient import CG1
from scmoe.moe.dispatcher import Dispatcher, LocalDispatcher, Pending, Receipt
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import ParallelContext
from scmoe.schedule.plan import Schedule
from scmoe.training.build_model import build_model

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


def tiny(*overrides: str) -> Config:
    return load(None, [*TINY, *overrides])


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights at which every term counts: no zero bias, no norm of weight 1, experts and gates far apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        fresh = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if "norm.weight" in name:
            p.copy_(1 + 0.3 * fresh)
        else:
            p.copy_(fresh * (0.3 if p.dim() > 1 else 0.1))
    return module


def tiny_model(config: Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    return randomise(build_model(config, ParallelContext()).to(dtype), seed)


def tiny_batch(config: Config, batch_size: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Input ids and labels [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.data.vocab_size, (batch_size, config.data.seq_len + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient; a parameter without one fails."""
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12, what: str = "") -> None:
    """Differs by at most tolerance times the largest expected entry, or times 1 where all are smaller."""
    assert actual.shape == expected.shape, what
    if actual.numel():
        error = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        assert error <= tolerance, f"{what}: differs by {error:.1e}, allowed {tolerance:.0e}"


# ---------------------------------------------------------------------- recording


class _Mark(Function):
    """The identity, which writes its name into a log when it runs forward and when it runs backward."""

    @staticmethod
    def forward(ctx, x: Tensor, name: str, log: Log) -> Tensor:
        ctx.name, ctx.log = name, log
        log.forward.append(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.log.backward.append(ctx.name)
        return grad, None, None


@dataclass
class Log:
    forward: list[str] = field(default_factory=list)
    backward: list[str] = field(default_factory=list)

    def mark(self, x: Tensor, name: str) -> Tensor:
        return _Mark.apply(x, name, self)


class Recorded(nn.Module):
    """inner, with a mark before and after it."""

    def __init__(self, name: str, inner: nn.Module, log: Log) -> None:
        super().__init__()
        self.name, self.inner, self.log = name, inner, log

    def forward(self, x: Tensor, *rest) -> Tensor:
        return self.log.mark(self.inner(self.log.mark(x, f"{self.name} begin"), *rest), f"{self.name} end")


@dataclass(frozen=True)
class RecordedPending:
    inner: Pending
    name: str
    log: Log

    def wait(self) -> Tensor:
        return self.log.mark(self.inner.wait(), self.name)


class RecordingDispatcher:
    """Marks where transfers start and where they are awaited: the two autograd nodes of a real one."""

    def __init__(self, log: Log, inner: Dispatcher | None = None) -> None:
        self.log, self.inner = log, inner or LocalDispatcher()
        self.dispatches, self.combines = 0, 0

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor | None) -> tuple[Pending, Receipt]:
        chunk, self.dispatches = self.dispatches, self.dispatches + 1
        pending, receipt = self.inner.dispatch(self.log.mark(rows_RD, f"dispatch {chunk} start"), counts_E)
        return RecordedPending(pending, f"dispatch {chunk} wait", self.log), receipt

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        chunk, self.combines = self.combines, self.combines + 1
        pending = self.inner.combine(self.log.mark(rows_RD, f"combine {chunk} start"), receipt)
        return RecordedPending(pending, f"combine {chunk} wait", self.log)


DIM, FFN, EXPERTS = 16, 24, 6


def tiny_stream(
    top_k: int = 2,
    capacity_factor: float | None = None,
    chunks: int = 1,
    dispatcher: Dispatcher | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> MoEStream:
    router, experts = Router(DIM, EXPERTS, top_k), Experts(DIM, FFN, EXPERTS)
    stream = MoEStream(router, experts, dispatcher or LocalDispatcher(), capacity_factor, chunks)
    return randomise(stream.to(dtype), seed)


def tiny_sublayers(dim: int = DIM) -> list[nn.Module]:
    """A pair's: attention, MLP, attention."""
    parts = [Attention(dim, 2), MLP(dim, FFN), Attention(dim, 2)]
    return [Residual(nn.LayerNorm(dim), part) for part in parts]


def recorded_shortcut_block(
    schedule: Schedule, capacity_factor: float | None, log: Log, blocking=None
) -> ShortcutBlock:
    """A ScMoE pair whose operators and transfers write into log. blocking: wraps the recording dispatcher."""
    dispatcher = RecordingDispatcher(log)
    stream = tiny_stream(2, capacity_factor, schedule.chunks, blocking(dispatcher) if blocking else dispatcher)
    stream.experts = Recorded("experts", stream.experts, log)
    names = ("attention", "mlp", "attention")
    sublayers = [Recorded(name, sublayer, log) for name, sublayer in zip(names, tiny_sublayers(), strict=True)]
    shared_expert = Recorded("shared_expert", MLP(DIM, FFN), log)
    norms = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
    block = ShortcutBlock(sublayers, *norms, shared_expert, CG1(DIM), stream, schedule)
    return randomise(block.double(), seed=1)
