"""The laboratory's training step, without a Trainer: benches and the check of a GPU take it.

The model is wrapped as the Strategy wraps it (scmoe/parallel/update/wrap.py), and clipped as the
Strategy clips.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from scmoe.parallel.dense.sharded import bytes_of
from scmoe.parallel.mesh import Mesh, expert_parameters
from scmoe.parallel.update.guard import clip_grad_norm
from scmoe.parallel.update.wrap import Wrapped


class Step:
    """A step of a wrapped model: call `model` for the forward pass, then `backward`, `update` and
    `zero_grad`.

    optimizer: None: nothing is updated. clip: the largest global gradient norm; None: the norm is
    not computed.
    """

    def __init__(
        self,
        wrapped: Wrapped,
        mesh: Mesh,
        optimizer: Optimizer | None = None,
        clip: float | None = None,
    ) -> None:
        self.wrapped = wrapped
        self.mesh = mesh
        self.optimizer = optimizer
        self.clip = clip
        self.model = wrapped.module
        self.parameters = list(self.model.parameters())
        self.shards = {p for _, p in expert_parameters(self.model)}

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Run the backward pass. gradient: of the loss, if that is no single number."""
        self.wrapped.backward(loss, gradient)

    def update(self) -> None:
        if self.clip is not None:
            clip_grad_norm(self.parameters, self.shards, self.clip, self.mesh)
        if self.optimizer is not None:
            self.optimizer.step()

    def train(self, *inputs: Tensor) -> None:
        """Take a whole step, whose loss is the sum of the outputs."""
        y = self.model(*inputs)
        self.backward(y, torch.ones_like(y))
        self.update()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def held_bytes(self) -> int:
        """Return the bytes on this rank of weights, optimizer state and existing gradients."""
        state = [] if self.optimizer is None else self.optimizer.state.values()
        moments = [
            value for entry in state for value in entry.values() if isinstance(value, Tensor)
        ]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return bytes_of(self.parameters) + bytes_of(moments) + bytes_of(gradients)
