"""Sums the gradients of split weights over ranks while backward goes on; FSDP on gloo would wait for each sum.

    link    rows      piece piece rows           piece piece piece ...
    rank    block 1   block 0                    wait for what is left

A Pacer sends pieces where rows leave the link free (pacing.py). At most one unit's gradients wait to be sent, so a rank
holds no more than the whole gradients of two units.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.futures import Future

from scmoe.lightning.seam import has_gradient_hooks, scatter_by
from scmoe.parallel.dense_shards import reshard
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.update.pacing import Pacer

SUMS_OF_A_UNIT = 3  # at most: of its dense weights, of those in float32, and of its experts


class PacedScatter:
    """FSDP calls this instead of a reduce-scatter. A call returns before its `output_tensor` is set; `wait` sets all.

    `at_once`: FSDP or a hook reads each sum right after the call, so each call waits for its sum.
    """

    def __init__(self, pacer: Pacer, context: ParallelContext, parameters: Sequence[nn.Parameter]) -> None:
        self.pacer, self.context, self.parameters, self.at_once = pacer, context, parameters, True
        self.sums: deque[Future[Tensor]] = deque()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM and not async_op
        # FSDP's own group carries gathers, which begin on another thread
        everywhere = group.size() == self.context.world_size
        own_group = self.context.gradient_group if everywhere else self.context.edp_group
        all_RN = input_tensor.view(group.size(), -1)
        self.wait(0 if self.at_once else SUMS_OF_A_UNIT - 1)
        self.sums.append(self.pacer.scatter(output_tensor, all_RN, own_group))
        if self.at_once:
            self.wait()

    def wait(self, left: int = 0) -> None:
        """Wait until no more than `left` sums are missing."""
        while len(self.sums) > left:
            self.sums.popleft().wait()

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Run a backward pass inside. FSDP reads a sum at once to round it to 16 bits or to add it to that of an
        earlier batch, and hooks on gradients read it."""
        self.at_once = any(p.grad is not None or p.dtype.itemsize < 4 or has_gradient_hooks(p) for p in self.parameters)
        try:
            yield
            self.wait()
        finally:
            self.sums.clear()


@contextmanager
def paced_scatters(module: nn.Module, context: ParallelContext) -> Iterator[PacedScatter]:
    """Pace the gradients of a module whose weights are split over all ranks. Yields what each backward runs in."""
    reshard(module)  # so that its parameters are those which get the sums
    pacer = Pacer(context.gradient_group, context.link)
    scatter = PacedScatter(pacer, context, list(module.parameters()))
    with ExitStack() as at_end:
        at_end.callback(pacer.stop)
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                at_end.callback(scatter_by(unit, scatter))
        yield scatter
