"""Wraps a model for training on many ranks: the one place that assembles DDP or FSDP2, the experts'
reducer, pacing.

    replicated dense weights   DDP averages their gradients, ExpertGradientReducer those of the
                               experts; paced on CPUs
    split dense weights        FSDP2 gathers all weights and sums all gradients (dense.py); paced on
                               CPUs

After backward every gradient is that of the mean of the ranks' losses. Each rank's loss is a mean
over its own tokens. The gradient of a shard of experts arrives summed over its EP group, whose
tokens it has seen, because the All-to-All's backward adds it up. So it is divided by EP when it
arrives, and averaged over EDP when backward ends: accumulating batches then works as it does under
DDP.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from scmoe.models.fsdp_units import whole_parameters
from scmoe.parallel.dense import prefetch, reshard
from scmoe.parallel.mesh import Mesh, expert_parameters
from scmoe.parallel.torch_seam import (
    call_after_backward,
    has_gradient_hooks,
    hide_from_ddp,
    scatter_by,
)
from scmoe.parallel.update.pacing import BUCKET_MB, Pacer, is_paced
from scmoe.parallel.wire.wire import Wire

SUMS_OF_A_UNIT = 3  # at most: of its dense weights, of those in float32, and of its experts


class ExpertGradientReducer:
    """Averages expert gradients over the expert-data-parallel group.

    They travel in buckets that are sent while backward runs. Buckets fill in reverse order of
    registration, which is roughly the order of backward. They are sent strictly in order, so that
    all ranks send them in the same order. While not `enabled`, gradients accumulate on this rank
    only. A frozen shard is in no bucket; it may be frozen or unfrozen between steps, on all ranks
    together.

    pacer: sums over that group when rows leave its link free; None: full buckets are sent at once.
    """

    def __init__(
        self, shards: Sequence[nn.Parameter], mesh: Mesh, pacer: Pacer | None = None
    ) -> None:
        self.mesh, self.enabled = mesh, True
        self.start: Callable[[Tensor], Any] = pacer.start if pacer else self._start_at_once
        self.bucket_bytes = int((BUCKET_MB if pacer else 25.0) * 2**20)  # as DDP's
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
        self.in_flight: list[tuple[Any, Tensor, list[Tensor]]] = []
        call_after_backward(self._finish)

    def _start_at_once(self, flat: Tensor) -> Any:
        return dist.all_reduce(flat, group=self.mesh.edp_group, async_op=True)

    def _scale(self, grad: Tensor) -> Tensor:
        return grad / self.mesh.ep_size

    def _ready(self, p: nn.Parameter) -> None:
        if not self.enabled or self.mesh.edp_size == 1:
            return
        if not self.listening:
            self._listen()
        self.missing[self.bucket_of[p]] -= 1
        while len(self.in_flight) < len(self.buckets) and self.missing[len(self.in_flight)] == 0:
            self._launch(len(self.in_flight))

    def _launch(self, i: int) -> None:
        grads = []
        for p in self.buckets[i]:
            # it took no part in this loss, but the mean over the group needs every rank
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        flat = torch.cat([g.flatten() for g in grads])
        self.in_flight.append((self.start(flat), flat, grads))

    @torch.no_grad()
    def _finish(self) -> None:
        while len(self.in_flight) < len(self.buckets):
            self._launch(len(self.in_flight))
        for work, flat, grads in self.in_flight:
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


class PacedScatter:
    """Sums the gradients of split weights over ranks while backward goes on; FSDP on gloo would
    wait for each sum.

        link    rows      piece piece rows           piece piece piece ...
        rank    block 1   block 0                    wait for what is left

    FSDP calls this instead of a reduce-scatter. A call returns before its `output_tensor` is set;
    `wait` sets all. At most one unit's gradients wait to be sent, so a rank holds no more than the
    whole gradients of two units.

    `at_once`: FSDP or a hook reads each sum right after the call, so each call waits for its sum.
    """

    def __init__(self, pacer: Pacer, mesh: Mesh, parameters: Sequence[nn.Parameter]) -> None:
        self.pacer = pacer
        self.mesh = mesh
        self.parameters = parameters
        self.at_once = True
        self.sums: deque[Future[Tensor]] = deque()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM and not async_op
        # FSDP's own group carries gathers, which begin on another thread
        everywhere = group.size() == self.mesh.world_size
        sum_group = self.mesh.gradient_group if everywhere else self.mesh.edp_group
        all_RN = input_tensor.view(group.size(), -1)
        self.wait(0 if self.at_once else SUMS_OF_A_UNIT - 1)
        self.sums.append(self.pacer.scatter(output_tensor, all_RN, sum_group))
        if self.at_once:
            self.wait()

    def wait(self, left: int = 0) -> None:
        """Wait until no more than `left` sums are missing."""
        while len(self.sums) > left:
            self.sums.popleft().wait()

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Run a backward pass inside.

        FSDP reads a sum at once to round it to 16 bits or to add it to that of an earlier batch,
        and hooks on gradients read it.
        """
        self.at_once = any(
            p.grad is not None or p.dtype.itemsize < 4 or has_gradient_hooks(p)
            for p in self.parameters
        )
        try:
            yield
            self.wait()
        finally:
            self.sums.clear()


class Wrapped:
    """A wrapped model: call `module` in place of the model, and `backward` in place of the loss's.

    `close` ends it.
    """

    reducer: ExpertGradientReducer | None = None  # of the experts; None where weights are split
    scatters: PacedScatter | None = None  # sums of split weights, where they are paced

    def __init__(self, module: nn.Module, world_size: int) -> None:
        self.module, self.world_size = module, world_size
        self.at_close = ExitStack()

    def own_part(self, loss: Tensor) -> Tensor:
        """Return what this rank's backward begins with.

        FSDP sums gradients over ranks and divides nothing.
        """
        averaged = isinstance(self.module, DistributedDataParallel) or self.world_size == 1
        return loss if averaged else loss / self.world_size

    def during_backward(self) -> Any:
        """Return a context in which backward runs."""
        return self.scatters.during_backward() if self.scatters else nullcontext()

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Run the backward pass. gradient: of the loss, if that is no single number."""
        with self.during_backward():
            self.own_part(loss).backward(gradient)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients accumulate on their ranks inside.

        Where weights are split each batch's gradients are split and added up all the same: whole
        ones would need memory on every rank.
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
        self.at_close.close()


def has_sparse_gradients(model: nn.Module) -> bool:
    return any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse for m in model.modules())


def wrap(
    model: nn.Module, wire: Wire, reductions: str | None = None, hidden: bool = True, **ddp: Any
) -> Wrapped:
    """Wrap a model with this rank's experts.

    Its dense weights are split already where `wire.mesh.dense_mesh` is set. wire: of the model's
    dispatchers, whose rows go before gradients that are paced.

    reductions: ddp | paced; None: paced on CPUs. hidden: False lets FSDP wait for each gather and
    each sum, which is what `bench dense` compares with. ddp: arguments of DistributedDataParallel.
    """
    # `model.requires_grad_()` has reached it; DDP would wait for its gradient
    for bias in whole_parameters(model):
        bias.requires_grad_(False)
    mesh = wire.mesh
    if mesh.dense_mesh is not None:
        return _over_fsdp(model, wire, hidden)
    shards = dict(expert_parameters(model))
    hide_from_ddp(model, shards)
    paced = is_paced(reductions, next(model.parameters()).device, has_sparse_gradients(model))
    if paced:
        ddp.setdefault("bucket_cap_mb", BUCKET_MB)
    ddp.setdefault("gradient_as_bucket_view", True)
    module = DistributedDataParallel(model, **ddp)
    wrapped = Wrapped(module, mesh.world_size)
    pacer: Pacer | None = None
    if paced:
        # two, because the order of dense and expert buckets may differ from rank to rank: DDP sends
        # the bucket of an unused parameter at the end
        dense = Pacer(mesh.gradient_group, wire.link)
        pacer = Pacer(mesh.edp_group, wire.link)
        module.register_comm_hook(None, dense.mean_of_bucket)
        wrapped.at_close.callback(dense.stop)
        wrapped.at_close.callback(pacer.stop)
    wrapped.reducer = ExpertGradientReducer([*shards.values()], mesh, pacer)
    wrapped.at_close.callback(wrapped.reducer.remove)
    return wrapped


def _over_fsdp(model: nn.Module, wire: Wire, hidden: bool) -> Wrapped:
    mesh = wire.mesh
    wrapped = Wrapped(model, mesh.world_size)
    dense_mesh = mesh.dense_mesh
    assert dense_mesh is not None
    if not hidden:
        prefetch(model, False)
    elif dense_mesh.ndim == 1 and dense_mesh.device_type == "cpu":
        reshard(model)  # so that its parameters are those which get the sums
        pacer = Pacer(mesh.gradient_group, wire.link)
        wrapped.at_close.callback(pacer.stop)
        wrapped.scatters = PacedScatter(pacer, mesh, list(model.parameters()))
        for unit in model.modules():
            if isinstance(unit, FSDPModule):
                wrapped.at_close.callback(scatter_by(unit, wrapped.scatters))
    return wrapped
