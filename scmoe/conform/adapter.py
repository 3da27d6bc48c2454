"""What a layer must provide before its expert parallelism can be examined: an Adapter
of hooks, which `make(group, weights, dtype)` of the user's own file returns.

    def make(group, weights, dtype):
        layer = TheirLayer(...)                     # on this rank of `group`, with `weights`
        return Adapter(forward=layer, experts=..., dense=...)

Everything is said by global expert id, so it does not matter which rank holds which expert. A hook
that is None is a question that is not asked.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scmoe.conform.plain import Plain, Weights

RATE = 0.1  # learning rate of the plain SGD of `step`

# {expert id: {name: tensor}}, and {name: tensor}
ByExpert = dict[int, dict[str, Tensor]]
ByName = dict[str, Tensor]
# the value or the gradient of a parameter
Read = Callable[[Tensor], Tensor]


class NotAsked(Exception):
    """A layer cannot be asked a question. `make` and every hook may raise it, with the reason."""


@dataclass(frozen=True)
class Group:
    """This rank's place. Ranks with consecutive numbers share one set of experts (`ep`, of ep_size
    ranks); ranks of `edp` hold the same experts. Every rank has tokens of its own."""

    rank: int
    size: int
    ep_size: int
    ep: Any
    edp: Any

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep_size

    def experts(self, num_experts: int) -> range:
        """Return the ids of this rank's experts, if each rank holds neighbouring ones."""
        share = num_experts // self.ep_size
        return range(self.ep_rank * share, (self.ep_rank + 1) * share)


class Packed:
    """How a layer stores an expert's weights in one tensor: Packed("gate", "up") is gate above up,
    [2F, D]; `transposed` is the transpose of it, [D, 2F]."""

    def __init__(self, *names: str, transposed: bool = False) -> None:
        self.names = names
        self.transposed = transposed

    def join(self, expert: Mapping[str, Tensor]) -> Tensor:
        """Return the layer's tensor of an expert's plain weights."""
        joined = torch.cat([expert[name] for name in self.names])
        return joined.T.contiguous() if self.transposed else joined

    def stack(self, experts: Mapping[int, Mapping[str, Tensor]], ids: Iterable[int]) -> Tensor:
        """Return the tensors of several experts as one, [experts, ...]."""
        return torch.stack([self.join(experts[i]) for i in ids])

    def split(self, tensor: Tensor) -> ByName:
        """Return the plain weights, or their gradients, of the layer's tensor."""
        rows = tensor.T if self.transposed else tensor
        return dict(zip(self.names, rows.chunk(len(self.names)), strict=True))


class LowRank(NamedTuple):
    """An adapter of an expert's weight `up`, which becomes up + b a: a is [R, D], b is [F, R]."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The hooks of a layer on one rank. The first three are needed.

    forward(x_TD): the output of this rank's tokens. experts(read), dense(read): of each parameter p
    the tensor read(p), which is p's value, or its gradient after all of the library's own
    reductions; a slice of it, or a whole one gathered, is fine. A rank names its own experts only,
    and every rank names all dense weights: "router" [E, D], "projection" [D, D] where the layer has
    one before its router and experts, "bias" [E], which chooses experts, and others under any name.

    backward(loss): in place of loss.backward(). no_sync(): a context in which gradients are
    accumulated and not reduced. clip(limit): clip by the global norm, and return the norm before
    that. step(): one step of SGD of rate RATE, what the library does after each, and no gradient
    after it. freeze(): the experts' weights need no gradient from now on. masked(x_TD, mask_T):
    forward where mask_T False is padding. capacity(slots): from now on an expert takes at most this
    many copies of a rank's tokens. rows(): rows that this rank's experts computed in the last
    forward. recompute(): from now on forward is computed again in backward. balance(): the balance
    loss of the last forward, as it is logged, of all ranks' tokens. lora(factors): adds these to
    the experts; `experts` then names "up_a" and "up_b" too. save(folder), load(folder): a
    checkpoint, by all ranks.

    names: how the tensors that `experts` names are stored; one that is missing is a plain weight.
    plain: the layer's formula; None: the layer in one process is the only measure. average:
    gradients are those of the mean of the ranks' losses, as under DDP; if not, of their sum.
    loss_scale: by what `backward` multiplies a loss. shares_tokens: all ranks of an EP group have
    the same tokens, outputs and loss, as under tensor parallelism.
    """

    forward: Callable[[Tensor], Tensor]
    experts: Callable[[Read], ByExpert]
    dense: Callable[[Read], ByName]

    backward: Callable[[Tensor], Any] = Tensor.backward
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    clip: Callable[[float], Any] | None = None
    step: Callable[[], Any] | None = None
    freeze: Callable[[], Any] | None = None
    masked: Callable[[Tensor, Tensor], Tensor] | None = None
    capacity: Callable[[int], Any] | None = None
    rows: Callable[[], int] | None = None
    recompute: Callable[[], Any] | None = None
    balance: Callable[[], Any] | None = None
    lora: Callable[[dict[int, LowRank]], Any] | None = None
    save: Callable[[str], Any] | None = None
    load: Callable[[str], Any] | None = None

    names: Mapping[str, Packed] = field(default_factory=dict)
    plain: Plain | None = None
    average: bool = True
    loss_scale: float = 1.0
    shares_tokens: bool = False

    def plain_experts(self, read: Read) -> ByExpert:
        """Return `experts` with each tensor split into plain weights."""
        experts: ByExpert = {}
        for i, tensors in self.experts(read).items():
            experts[i] = {}
            for name, tensor in tensors.items():
                experts[i] |= self.names.get(name, Packed(name)).split(tensor)
        return experts


Make = Callable[[Group, Weights, torch.dtype], Adapter]


def value(parameter: Tensor) -> Tensor:
    return parameter.detach().clone()


def gradient(parameter: Tensor) -> Tensor:
    """Return the gradient, which is zero where there is none: the expert had no token."""
    if parameter.grad is None:
        return torch.zeros_like(parameter).detach()
    return parameter.grad.detach().clone()
