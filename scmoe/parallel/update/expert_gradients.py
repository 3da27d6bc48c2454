"""Averages the gradients of experts over ranks, while backward runs.

Each rank's loss is a mean over its own tokens. The gradient of a shard of experts arrives summed
over its EP group, whose tokens it has seen, because the All-to-All's backward adds it up. So it is
divided by EP when it arrives, and averaged over EDP when backward ends: accumulating batches then
works as it does under DDP.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe.parallel.mesh import Mesh
from scmoe.parallel.torch_seam import call_after_backward

BUCKET_MB = 25.0  # of gradients that are summed together, as DDP's
# Between hosts, small buckets are full while there is backward left to hide their sums
# (docs/decisions/0039-reductions.md).
BUCKET_MB_ON_CPU = 1.0


class ExpertGradientReducer:
    """Averages expert gradients over the expert-data-parallel group.

    They travel in buckets that are sent while backward runs. Buckets fill in reverse order of
    registration, which is roughly the order of backward. They are sent strictly in order, so that
    all ranks send them in the same order. While not `enabled`, gradients accumulate on this rank
    only (`unsent`); the next backward with `enabled` sends them, even if it reaches no expert,
    provided that `begin` got its loss. A frozen shard is in no bucket; it may be frozen or unfrozen
    between steps, on all ranks together.
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
        # earlier batches may have left gradients on their ranks; equal on all ranks
        self.unsent = False

    def begin(self, loss: Tensor) -> None:
        """Let the backward of a loss send what earlier batches have left, even if it reaches no
        expert, whose hook would begin that. Call it on every rank."""
        if self.enabled and self.unsent and self.mesh.edp_size > 1 and loss.requires_grad:
            loss.register_hook(self._begin)

    def _begin(self, _: Tensor) -> None:
        if self.unsent and not self.listening:
            self._listen()

    def _listen(self) -> None:
        """Begin a backward pass."""
        self.listening = True
        self.buckets = list(
            _buckets([p for p in self.shards if p.requires_grad], self.bucket_bytes)
        )
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.missing = [len(bucket) for bucket in self.buckets]
        self.launched: list[tuple[Any, Tensor, list[nn.Parameter]]] = []
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
        bucket = self.buckets[i]
        # an expert without a gradient sends zeros, as the mean over the group needs every rank
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        uses = grads[0].new_ones(len(bucket))  # of each, by this rank's loss
        for number, p in enumerate(bucket):
            if p.grad is None:
                uses[number] = 0
        flat = torch.cat([*(g.flatten() for g in grads), uses])
        work = dist.all_reduce(flat, group=self.mesh.edp_group, async_op=True)
        self.launched.append((work, flat, bucket))

    @torch.no_grad()
    def _finish(self) -> None:
        while len(self.launched) < len(self.buckets):
            self._launch(len(self.launched))
        self.launched.reverse()
        while self.launched:  # each flat bucket is let go once it is read
            work, flat, bucket = self.launched.pop()
            work.wait()
            flat /= self.mesh.edp_size
            *means, uses = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for p, mean, used in zip(bucket, means, uses, strict=True):
                if p.grad is not None:
                    p.grad.copy_(mean.view_as(p))
                elif used > 0:  # by another rank; else an optimizer leaves it out
                    p.grad = mean.view_as(p).clone()
        self.listening = self.unsent = False

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
