"""Wraps a model for training on many ranks: the one place that assembles DDP or FSDP2 and the
experts' reducer.

    replicated dense weights   DDP averages their gradients, ExpertGradientReducer those of the
                               experts (expert_gradients.py). DDP refuses a model of which no dense
                               weight trains, so that one has the reducer alone
    split dense weights        FSDP2 gathers all weights and sums all gradients (dense/sharded.py)

After backward every gradient is that of the mean of the ranks' losses.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from scmoe.parallel.dense.fsdp_units import whole_parameters
from scmoe.parallel.mesh import Mesh, expert_parameters
from scmoe.parallel.torch_seam import hide_from_ddp
from scmoe.parallel.update.expert_gradients import (
    BUCKET_MB,
    BUCKET_MB_ON_CPU,
    ExpertGradientReducer,
)


class Wrapped:
    """A wrapped model: call `module` in place of the model, and `backward` in place of the loss's.

    `close` takes the reducer's hooks from the experts.
    """

    reducer: ExpertGradientReducer | None = None  # of the experts; None where weights are split

    def __init__(self, module: nn.Module, world_size: int) -> None:
        self.module, self.world_size = module, world_size

    def own_part(self, loss: Tensor) -> Tensor:
        """Return what this rank's backward begins with. Call it right before that backward, which
        it prepares.

        DDP averages gradients over ranks, FSDP sums them.
        """
        if self.reducer is not None:
            self.reducer.begin(loss)
        averaged = self.reducer is not None or self.world_size == 1
        return loss if averaged else loss / self.world_size

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Run the backward pass. gradient: of the loss, if that is no single number."""
        self.own_part(loss).backward(gradient)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on their ranks inside.

        Where weights are split, each batch's gradients are summed over ranks anyway: whole ones
        would need memory on every rank.
        """
        if self.reducer is None:
            yield
            return
        self.reducer.enabled = False
        self.reducer.unsent = True
        try:
            with self.ddp_unsynced():
                yield
        finally:
            self.reducer.enabled = True

    def ddp_unsynced(self) -> AbstractContextManager[None]:
        if isinstance(self.module, DistributedDataParallel):
            return self.module.no_sync()
        return nullcontext()

    def check_late_experts(self, module: nn.Module) -> None:
        """Raise ValueError for experts that were added after their gradients got a reducer."""
        known = {*self.reducer.shards} if self.reducer else set()
        for name, p in expert_parameters(module):
            if p.requires_grad and p not in known and not isinstance(p, DTensor):
                raise ValueError(
                    f"{name} was added after fit had begun. Add experts in configure_model or setup"
                )

    def close(self) -> None:
        if self.reducer is not None:
            self.reducer.remove()


def wrap(model: nn.Module, mesh: Mesh, **ddp: Any) -> Wrapped:
    """Wrap a model with this rank's experts.

    Its dense weights are split already where `mesh.dense_mesh` is set. ddp: arguments of
    DistributedDataParallel.
    """
    # `model.requires_grad_()` has reached it; DDP would wait for its gradient
    for bias in whole_parameters(model):
        bias.requires_grad_(False)
    if mesh.dense_mesh is not None:
        return Wrapped(model, mesh.world_size)
    shards = dict(expert_parameters(model))
    hide_from_ddp(model, shards)
    on_cpu = next(model.parameters()).device.type == "cpu"
    bucket_mb = ddp.get("bucket_cap_mb") or (BUCKET_MB_ON_CPU if on_cpu else BUCKET_MB)
    arguments = {"gradient_as_bucket_view": True} | ddp | {"bucket_cap_mb": bucket_mb}
    dense = [p for name, p in model.named_parameters() if name not in shards]
    if any(p.requires_grad for p in dense):
        wrapped = Wrapped(DistributedDataParallel(model, **arguments), mesh.world_size)
    else:
        if mesh.world_size > 1 and ddp.get("init_sync", True):  # as DDP does when it is built
            for tensor in (*dense, *model.buffers()):
                dist.broadcast(tensor.detach(), 0)
        wrapped = Wrapped(model, mesh.world_size)
    wrapped.reducer = ExpertGradientReducer([*shards.values()], mesh, bucket_mb)
    return wrapped
