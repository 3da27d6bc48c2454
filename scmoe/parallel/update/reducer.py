"""Averages gradients of expert shards over all ranks; a shard has seen the tokens of its whole EP group.

Each rank's loss is a mean over its own tokens, and dense gradients are averaged over all ranks. A shard's gradient
arrives summed over the EP group, because the All-to-All's backward adds it up. So it is divided by EP and averaged over
EDP: divided when it arrives, averaged when backward ends, so that accumulating batches works as it does under DDP.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.torch_seam import call_after_backward
from scmoe.parallel.update.pacing import BUCKET_MB, Pacer


class ExpertGradientReducer:
    """Averages expert gradients over the expert-data-parallel group, in buckets that are sent while backward runs.

    Buckets fill in reverse order of registration, which is roughly the order of backward. They are sent strictly in
    order, so that all ranks send them in the same order. While not `enabled`, gradients accumulate on this rank only.
    A frozen shard is in no bucket; it may be frozen or unfrozen between steps, on all ranks together.

    pacer: sums over that group when rows leave its link free; None: full buckets are sent at once.
    """

    def __init__(self, shards: Sequence[nn.Parameter], context: ParallelContext, pacer: Pacer | None = None) -> None:
        self.context, self.enabled = context, True
        at_once: Callable[[Tensor], Any] = partial(dist.all_reduce, group=context.edp_group, async_op=True)
        self.start = pacer.start if pacer else at_once
        self.bucket_bytes = int((BUCKET_MB if pacer else 25.0) * 2**20)  # as DDP's
        self.shards = [*reversed(shards)]
        self.hooks: list[Any] = []
        for p in self.shards:
            trained = p.requires_grad
            p.requires_grad_()  # else torch accepts no hooks
            self.hooks.append(p.register_post_accumulate_grad_hook(self._ready))
            if context.ep_size > 1:
                self.hooks.append(p.register_hook(self._scale))
            p.requires_grad_(trained)
        self.listening = False

    def _listen(self) -> None:
        """Begin a backward pass."""
        self.listening = True
        self.buckets = list(_buckets([p for p in self.shards if p.requires_grad], self.bucket_bytes))
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]
        self.in_flight: list[tuple[Any, Tensor, list[Tensor]]] = []
        call_after_backward(self._finish)

    def _scale(self, grad: Tensor) -> Tensor:
        return grad / self.context.ep_size

    def _ready(self, p: nn.Parameter) -> None:
        if not self.enabled or self.context.edp_size == 1:
            return
        if not self.listening:
            self._listen()
        self.missing[self.bucket_of[p]] -= 1
        while len(self.in_flight) < len(self.buckets) and self.missing[len(self.in_flight)] == 0:
            self._launch(len(self.in_flight))

    def _launch(self, i: int) -> None:
        grads = []
        for p in self.buckets[i]:
            if p.grad is None:  # it took no part in this loss, but the mean over the group needs every rank
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
            flat /= self.context.edp_size
            for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(mean.view_as(g))
        self.listening = False

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _buckets(parameters: Sequence[nn.Parameter], max_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Yield consecutive parameters of one dtype, at most max_bytes in total, or a single larger one."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and (p.dtype != bucket[0].dtype or sum(q.nbytes for q in bucket) + p.nbytes > max_bytes):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
