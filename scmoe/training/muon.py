"""The optimizers: AdamW for everything, or Muon for the matrices and AdamW for the rest.

Muon (Jordan et al. 2024) replaces the running mean of a matrix's gradients by a near-orthogonal
matrix. The mathematics is that of torch.optim.Muon, which takes single matrices. An experts' weight
is a stack of matrices [e, in, out], and each of them is updated on its own. So an expert's update
does not depend on how many others its rank holds.

Updates are scaled to the size of AdamW's, 0.2 sqrt(max(in, out)) (Liu et al. 2025, "Muon is
scalable for LLM training"), so that both share a learning rate. The scale is the same for a matrix
and its transpose: experts are stored transposed to Linear layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Trained(NamedTuple):
    """The parameters that are trained; each is in one of the lists.

    matrices: weights of hidden layers and gates [out, in], and of experts, a stack [e, in, out].
    decayed: others with weight decay: output layer, convolutions. undecayed: norms, biases,
    embeddings.
    """

    matrices: list[nn.Parameter]
    decayed: list[nn.Parameter]
    undecayed: list[nn.Parameter]


def adamw(
    parameters: Trained,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> Optimizer:
    """Return AdamW for all parameters. `undecayed` ones have no weight decay."""
    groups = [
        {"params": [*parameters.matrices, *parameters.decayed], "weight_decay": weight_decay},
        {"params": parameters.undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


class MuonAndAdamW(Optimizer):
    """Updates `parameters.matrices` by Muon and the others by AdamW.

    Muon's state is "momentum_buffer"; AdamW has its own.
    """

    def __init__(
        self,
        parameters: Trained,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        others = (
            {"params": parameters.decayed, "weight_decay": weight_decay},
            {"params": parameters.undecayed},
        )
        self.adamw = torch.optim.AdamW(
            others, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True
        )
        matrices = {
            "params": parameters.matrices,
            "weight_decay": weight_decay,
            "momentum": momentum,
        }
        super().__init__([matrices, *self.adamw.param_groups], self.adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon_step(self.param_groups[0])
        # Loading may have replaced both.
        self.adamw.param_groups = self.param_groups[1:]
        self.adamw.state = self.state
        self.adamw.step()
        return loss

    def muon_step(self, group: dict[str, Any]) -> None:
        """Let torch.optim.Muon update views of the matrices, with views of their gradients and of
        the state."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

        views = split([p.detach() for p in parameters])
        gradients = split([p.grad for p in parameters])
        moments = split([self.state[p]["momentum_buffer"] for p in parameters])
        muon = torch.optim.Muon(
            views,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            adjust_lr_fn="match_rms_adamw",
        )
        for view, gradient, moment in zip(views, gradients, moments, strict=True):
            view.grad = gradient
            muon.state[view]["momentum_buffer"] = moment
        muon.step()


def split(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the matrices of stacks of matrices, as views, and single matrices as they are."""
    return [matrix for t in tensors for matrix in (t.unbind() if t.dim() > 2 else (t,))]
