"""Wraps a model for training on many ranks: the one place that assembles DDP or FSDP2, the experts' reducer, pacing.

    replicated dense weights   DDP averages their gradients, ExpertGradientReducer those of the experts; paced on CPUs
    split dense weights        FSDP2 gathers all weights and sums all gradients (dense_shards.py); paced on CPUs

After backward every gradient is that of the mean of the ranks' losses.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scmoe.parallel.dense_shards import prefetch
from scmoe.parallel.mesh import ParallelContext, expert_parameters
from scmoe.parallel.torch_seam import hide_from_ddp
from scmoe.parallel.update.pacing import BUCKET_MB, is_paced, pacing
from scmoe.parallel.update.reducer import ExpertGradientReducer
from scmoe.parallel.update.scatters import PacedScatter, paced_scatters


class Wrapped:
    """A wrapped model: call `module` instead of the model, and `backward` instead of the loss's own. `close` ends it.

    reducer: that of the experts; None where weights are split. scatters: sums of split weights, where they are paced.
    """

    def __init__(
        self,
        module: nn.Module,
        world_size: int,
        reducer: ExpertGradientReducer | None = None,
        scatters: PacedScatter | None = None,
    ) -> None:
        self.module, self.world_size, self.reducer, self.scatters = module, world_size, reducer, scatters
        self.at_close = ExitStack()

    def own_part(self, loss: Tensor) -> Tensor:
        """Return what this rank's backward begins with. FSDP sums gradients over ranks and divides nothing."""
        averaged = isinstance(self.module, DistributedDataParallel) or self.world_size == 1
        return loss if averaged else loss / self.world_size

    def during_backward(self) -> Any:
        """Return a context in which backward runs."""
        return self.scatters.during_backward() if self.scatters else nullcontext()

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """gradient: of the loss, if that is no single number."""
        with self.during_backward():
            self.own_part(loss).backward(gradient)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients accumulate on their ranks. Where weights are split each batch's gradients are split and
        added up all the same: whole ones would need memory on every rank."""
        if self.reducer is None or not isinstance(self.module, DistributedDataParallel):
            yield
            return
        self.reducer.enabled = False
        try:
            with self.module.no_sync():
                yield
        finally:
            self.reducer.enabled = True

    def close(self) -> None:
        self.at_close.close()


def wrap(
    model: nn.Module, context: ParallelContext, reductions: str | None = None, hidden: bool = True, **ddp: Any
) -> Wrapped:
    """Wrap a model with this rank's experts; its dense weights are split already where `context.dense_mesh` is set.

    reductions: ddp | paced; None: paced on CPUs. hidden: False lets FSDP wait for each gather and each sum, which is
    what `bench dense` compares with. ddp: arguments of DistributedDataParallel.
    """
    if context.dense_mesh is not None:
        return _over_fsdp(model, context, hidden)
    shards = dict(expert_parameters(model))
    hide_from_ddp(model, shards)
    device = next(model.parameters()).device
    paced = is_paced(reductions, device)
    if paced:
        ddp.setdefault("bucket_cap_mb", BUCKET_MB)
    ddp.setdefault("gradient_as_bucket_view", True)
    own_stream = torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()
    with own_stream:  # as torch's notes on DDP and CUDA streams ask for
        wrapped = Wrapped(DistributedDataParallel(model, **ddp), context.world_size)
    pacer = wrapped.at_close.enter_context(pacing(wrapped.module, context)) if paced else None
    wrapped.reducer = ExpertGradientReducer([*shards.values()], context, pacer)
    wrapped.at_close.callback(wrapped.reducer.remove)
    return wrapped


def _over_fsdp(model: nn.Module, context: ParallelContext, hidden: bool) -> Wrapped:
    mesh, wrapped = context.dense_mesh, Wrapped(model, context.world_size)
    assert mesh is not None
    if not hidden:
        prefetch(model, False)
    elif mesh.ndim == 1 and mesh.device_type == "cpu":
        wrapped.scatters = wrapped.at_close.enter_context(paced_scatters(model, context))
    return wrapped
