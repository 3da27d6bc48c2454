"""Wraps a model for training on many ranks: the one place that assembles DDP or FSDP2 and the
experts' reducer.

    replicated dense weights   DDP averages their gradients, ExpertGradientReducer those of the
                               experts
    split dense weights        FSDP2 gathers all weights and sums all gradients (sharded.py)

After backward every gradient is that of the mean of the ranks' losses. Each rank's loss is a mean
over its own tokens. The gradient of a shard of experts arrives summed over its EP group, whose
tokens it has seen, because the All-to-All's backward adds it up. So it is divided by EP when it
arrives, and averaged over EDP when backward ends: accumulating batches then works as it does under
DDP.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from scmoe.parallel.dense.fsdp_units import whole_parameters
from scmoe.parallel.mesh import Mesh, expert_parameters
from scmoe.parallel.torch_seam import call_after_backward, hide_from_ddp

BUCKET_MB = 25.0  # of gradients that are summed together, as DDP's
# Between hosts, small buckets are full while there is backward left to hide their sums
# (docs/decisions/0039-reductions.md).
BUCKET_MB_ON_CPU = 1.0


class ExpertGradientReducer:
    """Averages expert gradients over the expert-data-parallel group.

    They travel in buckets that are sent while backward runs. Buckets fill in reverse order of
    registration, which is roughly the order of backward. They are sent strictly in order, so that
    all ranks send them in the same order. While not `enabled`, gradients accumulate on this rank
    only. A frozen shard is in no bucket; it may be frozen or unfrozen between steps, on all ranks
    together.
    """

    def __init__(
        self, shards: Sequence[nn.Parameter], mesh: Mesh, bucket_mb: float = BUCKET_MB
    ) -> None:
        self.mesh = mesh
        self.enabled = True
        self.bucket_bytes = int(bucket_mb * 2**20)
        self.shards = [*reversed(shards)]
        self.hooks: list[Any] = []
        for p in self.shards:
            trained = p.requires_grad
            p.requires_grad_()  # else torch accepts no hooks
            self.hooks.append(p.register_post_accumulate_grad_hook(self._ready))
            if mesh.ep_size > 1:
                self.hooks.append(p.register_hook(self._scale))
            p.requires_grad_(trained)
        self.listening = False

    def _listen(self) -> None:
        """Begin a backward pass."""
        self.listening = True
        self.buckets = list(
            _buckets([p for p in self.shards if p.requires_grad], self.bucket_bytes)
        )
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]
        self.launched: list[tuple[Any, Tensor, list[Tensor]]] = []
        call_after_backward(self._finish)

    def _scale(self, grad: Tensor) -> Tensor:
        return grad / self.mesh.ep_size

    def _ready(self, p: nn.Parameter) -> None:
        if not self.enabled or self.mesh.edp_size == 1:
            return
        if not self.listening:
            self._listen()
        self.missing[self.bucket_of[p]] -= 1
        while len(self.launched) < len(self.buckets) and self.missing[len(self.launched)] == 0:
            self._launch(len(self.launched))

    def _launch(self, i: int) -> None:
        grads = []
        for p in self.buckets[i]:
            # it took no part in this loss, but the mean over the group needs every rank
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        flat = torch.cat([g.flatten() for g in grads])
        work = dist.all_reduce(flat, group=self.mesh.edp_group, async_op=True)
        self.launched.append((work, flat, grads))

    @torch.no_grad()
    def _finish(self) -> None:
        while len(self.launched) < len(self.buckets):
            self._launch(len(self.launched))
        for work, flat, grads in self.launched:
            work.wait()
            flat /= self.mesh.edp_size
            for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(mean.view_as(g))
        self.listening = False

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _buckets(parameters: Sequence[nn.Parameter], max_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Yield consecutive parameters of one dtype.

    They have at most max_bytes in total, or are a single larger one.
    """
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and (
            p.dtype != bucket[0].dtype or sum(q.nbytes for q in bucket) + p.nbytes > max_bytes
        ):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


class Wrapped:
    """A wrapped model: call `module` in place of the model, and `backward` in place of the loss's.

    `close` takes the reducer's hooks from the experts.
    """

    reducer: ExpertGradientReducer | None = None  # of the experts; None where weights are split

    def __init__(self, module: nn.Module, world_size: int) -> None:
        self.module, self.world_size = module, world_size

    def own_part(self, loss: Tensor) -> Tensor:
        """Return what this rank's backward begins with.

        DDP averages gradients over ranks, FSDP sums them.
        """
        averaged = isinstance(self.module, DistributedDataParallel) or self.world_size == 1
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
        if self.reducer is None or not isinstance(self.module, DistributedDataParallel):
            yield
            return
        self.reducer.enabled = False
        try:
            with self.module.no_sync():
                yield
        finally:
            self.reducer.enabled = True

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
    wrapped = Wrapped(DistributedDataParallel(model, **arguments), mesh.world_size)
    wrapped.reducer = ExpertGradientReducer([*shards.values()], mesh, bucket_mb)
    return wrapped
