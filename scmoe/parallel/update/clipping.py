"""Between backward and update: one global gradient norm, and no update that the guard has not seen (faults 22, 27).

Lightning's precision plugins clip by a norm that differs from rank to rank, as each holds other experts, and look at
nothing where nothing is clipped. Left out: a torch optimizer that is stepped past Lightning (`use_pl_optimizer=False`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.shards import expert_parameters
from scmoe.parallel.update.guard import Guard


class GuardedUpdate:
    """Puts itself in the place of what `plugin`, a precision plugin, does between backward and update."""

    def __init__(self, plugin: Any) -> None:
        self.plugin, self.original = plugin, type(plugin)
        self.module: nn.Module | None = None
        self.guard: Guard | None = None
        self.context: ParallelContext | None = None
        plugin.clip_grad_by_norm = self.clip_by_norm
        plugin.clip_gradients = self.clip
        plugin._after_closure = self.after_backward

    def begin(self, module: nn.Module, guard: Guard, context: ParallelContext) -> None:
        """Before training: what there is to look at."""
        self.module, self.guard, self.context = module, guard, context

    def after_backward(self, model: Any, optimizer: Optimizer) -> None:
        """All that happens before this optimizer's update; FloatingPointError, alike on every rank, where a gradient is
        not finite. RuntimeError: the module clips by other means."""
        assert self.guard is not None
        self.guard.has_looked = False
        self.original._after_closure(self.plugin, model, optimizer)
        if not model.automatic_optimization:  # there the module clips when and if it likes
            self.clip_by_norm(optimizer, None)
        elif not self.guard.has_looked:
            raise RuntimeError(
                f"{type(model).__name__}.configure_gradient_clipping has clipped by other means than "
                "self.clip_gradients, no update was made: each rank would take a norm of its own, and nothing would "
                "see a NaN; call self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm) there"
            )

    def clip(self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm") -> None:
        """What is not clipped by its norm is looked at all the same: no update with a number that is not finite."""
        if clip_val <= 0 or gradient_clip_algorithm != "norm":
            self.clip_by_norm(optimizer, None)
        self.original.clip_gradients(self.plugin, optimizer, clip_val, gradient_clip_algorithm)

    def clip_by_norm(self, optimizer: Optimizer, clip_val: float | None) -> None:
        """The norm is that of all ranks together. clip_val None: look, and change nothing."""
        assert self.module is not None and self.guard is not None and self.context is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shards = {p for _, p in expert_parameters(self.module)}
        norm = clip_grad_norm(parameters, shards, clip_val, self.context, self.guard.loss_as_zero())
        self.guard.check(norm, self.context)


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    shards: set[nn.Parameter],
    max_norm: float | None,
    context: ParallelContext,
    zero: Tensor | float = 0.0,
) -> Tensor:
    """Scales all gradients to the global norm max_norm if it is larger (None: never); returns the norm before.

    norm^2 = |dense|^2 + sum over ranks |shards|^2 / EDP. One sum over all ranks, so the norm is the same to the bit
    on every rank: were it only close, dense replicas would drift apart.
    zero: of the guard; where it is NaN on one rank, the norm is NaN on all.
    """
    parameters = list(parameters)
    dense = [p.grad for p in parameters if p.grad is not None and p not in shards]
    sharded = [p.grad for p in parameters if p.grad is not None and p in shards]
    square = torch.nn.utils.get_total_norm(sharded).square() / context.edp_size + zero
    norm = (context.sum_over_ranks(square) + torch.nn.utils.get_total_norm(dense).square()).sqrt()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
