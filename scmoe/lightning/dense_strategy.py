"""Dense weights are replicated, under DDP, or split over ranks, under FSDP2 (dense_shards.py)."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scmoe.lightning.fail_fast import FailFastStrategy
from scmoe.lightning.seam import hide_from_ddp, is_fitting, without_inference_mode
from scmoe.parallel.dense_choice import estimates_of, memory_of_rank, pick_dense
from scmoe.parallel.dense_shards import is_sharded, make_equal, shard, with_dense_mesh
from scmoe.parallel.update.scatters import PacedScatter, paced_scatters


class DenseWeightsStrategy(FailFastStrategy):
    """DDP that leaves everything to FSDP2 where dense weights are split, as `context.dense_mesh` says.

    `dense` and `dense_estimates` must be set before `setup_environment`. A module that has split its weights in
    `configure_model` is taken as it is.
    """

    timeout: timedelta
    at_teardown: ExitStack
    scatters: PacedScatter | None = None  # sharded, on CPUs
    dense: str  # one of dense_shards.WAYS
    dense_estimates: Mapping[str, float] | None  # for auto: bytes of a rank; None: counted once the module has weights

    @property
    def is_split(self) -> bool:
        return self.context.dense_mesh is not None

    def set_dense_mesh(self, how: str, estimates: Mapping[str, float] | None) -> None:
        """Set `context.dense_mesh` if dense weights are split. Every rank must call it.

        how: auto is decided by rank 0, from the estimates."""
        if how == "auto" and estimates is not None:
            memory = memory_of_rank(self.root_device, self.num_processes)
            how, why = self.broadcast(pick_dense(estimates, memory))
            self._say(f"strategy.dense=auto: dense weights are {how}; {why}")
        if how in ("sharded", "hybrid"):
            self.context = with_dense_mesh(self.context, how, self.num_processes, self.root_device, self.timeout)
            self.module.parallel_context = self.context

    def _say(self, line: str) -> None:
        """Print on rank 0. Lightning's own loggers may be silent."""
        if self.global_rank == 0:
            print(line, file=sys.stderr, flush=True)

    def model_to_device(self) -> None:
        if self.dense == "auto" and self.dense_estimates is None and not self.is_split:
            self.set_dense_mesh("auto", estimates_of(self.module, self.context, self.num_processes))
        if self.is_split and not is_sharded(self.module):
            shard(self.module, self.context, self.precision_plugin.precision)
        self._check_placements()
        if self.is_split:
            hide_from_ddp(self.module, [name for name, _ in self.module.named_parameters()])
        super().model_to_device()

    def _check_placements(self) -> None:
        """Raise ValueError for a module that an earlier fit has split in another way: its optimizers would fail."""
        mesh = self.context.dense_mesh
        wanted = None if mesh is None else mesh.ndim
        first = next(iter(self.module.parameters()), None)
        found = first.device_mesh.ndim if isinstance(first, DTensor) else None
        if first is not None and found != wanted:
            names = {None: "replicated", 1: "sharded", 2: "hybrid"}
            raise ValueError(
                f"dense is {names[wanted]}, but an earlier run has made this module's weights {names[found]}; allowed: "
                f"dense={names[found]}, or a new module that loads the checkpoint"
            )

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        make_equal(self.module, self.context)
        if self.is_split:
            without_inference_mode(trainer)
            self.model = Steps(self.module)  # so that hooks of FSDP on the LightningModule itself run around its steps
        self.scatters = None
        mesh = self.context.dense_mesh
        if is_fitting(trainer) and mesh is not None and mesh.ndim == 1 and mesh.device_type == "cpu":
            self.scatters = self.at_teardown.enter_context(paced_scatters(self.module, self.context))

    def configure_ddp(self) -> None:
        if not self.is_split:
            super().configure_ddp()

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """FSDP sums gradients over ranks and divides nothing, so this divides by the number of ranks."""
        with self.scatters.during_backward() if self.scatters else nullcontext():
            loss = closure_loss / self.world_size if self.is_split else closure_loss
            return super().backward(loss, *args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        if self.is_split:  # each batch's gradients are split and added up: whole ones would need memory on every rank
            yield
        else:
            with super().block_backward_sync():
                yield

    def teardown(self) -> None:
        if self.is_split:  # DDP's moves weights to the CPU, away from the mesh that they belong to
            assert self.cluster_environment is not None and self.accelerator is not None
            self.cluster_environment.teardown()
            self.precision_plugin.teardown()
            self.accelerator.teardown()
        else:
            super().teardown()


class Steps(nn.Module):
    """Calls a LightningModule as a module: its steps then run inside the hooks of its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
