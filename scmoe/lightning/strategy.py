"""`Trainer(strategy="expert_parallel")`: DDP or FSDP2 for dense weights, expert parallelism for `Experts` modules.

Launchers, ranks, the bucketed and overlapped reduction of dense gradients, no_sync and precision plugins are those of
Lightning's DDPStrategy. This file adds process groups before `configure_model`, expert shards outside DDP with a
reducer of their own, one global gradient norm, dropout that differs from rank to rank, and checkpoints that can be
loaded on any number of ranks. `job/` adds how ranks start, stop and fail together.

The LightningModule finds its place in the mesh in `self.parallel_context`, set before `configure_model` is called.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelSummary
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from scmoe.lightning.debug import CompareCollectives
from scmoe.lightning.lockstep import LockstepStrategy
from scmoe.lightning.refused_callbacks import check_callbacks
from scmoe.lightning.seam import (
    accumulated_batches,
    hide_from_ddp,
    is_fitting,
    prefer_buckets,
    set_default_timeout,
    was_interrupted,
)
from scmoe.parallel.checkpoint.saving import Checkpoints
from scmoe.parallel.checkpoint.state import check_can_be_saved, model_state, optimizer_state, tied_weights
from scmoe.parallel.dense_shards import check_dense
from scmoe.parallel.mesh import (
    EXCHANGES,
    build_context,
    check_experts,
    expert_parameters,
    order_launches_of_nccl,
    use_loopback_for_gloo,
)
from scmoe.parallel.update.clipping import check_precision, guard_updates
from scmoe.parallel.update.pacing import BUCKET_MB, is_paced, pacing
from scmoe.parallel.update.reducer import ExpertGradientReducer

LONGEST_S = 1e6  # what a timeout may be
START_TIMEOUT_S = 600.0  # for ranks to meet: they import, read data and build their modules at different speeds


class ExpertParallelStrategy(LockstepStrategy):
    """Splits experts over groups of `ep_size` ranks; everything else is replicated on all ranks, or split as well.

    ep_size: number of ranks that share one set of experts; None: all ranks.
    timeout_s: seconds that a collective may take before the job ends with an error. Until all ranks have met and built
        their modules the limit is START_TIMEOUT_S, if that is longer.
    async_checkpoint: training continues while a checkpoint is written; the files are complete some steps later.
    debug_collectives: ranks compare every collective before they take part in it; slow.
    full_checkpoint: rank 0 merges the shards of all ranks into one file.
    reductions: how gradients are sent. ddp: in full buckets; paced (CPUs): in pieces, after rows; None: paced on CPUs.
    exchange: how rows travel between nodes: flat | hierarchical | auto (mesh.build_context).
    dense: "replicated": dense weights on all ranks, under DDP. "sharded": over all ranks, and experts over the ranks
        that hold the same ones, under FSDP2. "hybrid": over the ranks of a node, with a copy on each node. "auto": the
        first of replicated, hybrid and sharded that a rank's memory has room for.
    dense_estimates: for auto, bytes that a rank needs each way; None: twice the weights, gradients and AdamW's moments.
    ddp: further arguments of DDPStrategy.

    Lightning finds out who starts the ranks: torchrun or SLURM if their environment variables are set, else this
    process. With start_method="popen" (the default) this process is rank 0 and runs its own command again for each
    other rank. With "spawn" (the module must be picklable) or "fork" (for notebooks) all ranks are child processes,
    which end with `fit`: this process then has the metrics and the checkpoints, but not the trained weights, and a
    SIGTERM must go to the children; this process then ends with an error instead of exit code 143.
    """

    restore_checkpoint_after_setup = True  # shards, optimizers and groups must exist before a checkpoint can be read
    lightning_restore_optimizer = False  # load_checkpoint does it

    def __init__(
        self,
        ep_size: int | None = None,
        timeout_s: float = 300.0,
        async_checkpoint: bool = False,
        debug_collectives: bool = False,
        full_checkpoint: bool = False,
        reductions: str | None = None,
        exchange: str = "auto",
        dense: str = "replicated",
        dense_estimates: Mapping[str, float] | None = None,
        **ddp: Any,
    ) -> None:
        if ep_size is not None and ep_size < 1:
            raise ValueError(f"ep_size is {ep_size}, allowed: None or a number of ranks, 1 or more")
        if not 0 < timeout_s <= LONGEST_S:
            raise ValueError(f"timeout_s is {timeout_s}, allowed: above 0, at most {LONGEST_S:g} seconds")
        check_dense(dense, ddp if reductions is None else ddp | {"reductions": reductions})
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange is {exchange!r}, allowed: {' | '.join(EXCHANGES)}")
        self.timeout, self.exchange = timedelta(seconds=timeout_s), exchange
        self.start_timeout = max(self.timeout, timedelta(seconds=START_TIMEOUT_S))
        super().__init__(**{"gradient_as_bucket_view": True, **ddp, "timeout": self.start_timeout})
        self.ep_size, self.debug_collectives = ep_size, debug_collectives
        self.dense, self.dense_estimates = dense, dense_estimates
        self.async_checkpoint, self.full_checkpoint = async_checkpoint, full_checkpoint
        self.reductions = reductions
        self.reducer: ExpertGradientReducer
        self.in_training = False  # from `setup` for fit to the end of training
        self.at_teardown = ExitStack()  # removes what `setup` has hooked into the module, the plugin and torch

    def setup_environment(self) -> None:
        check_callbacks(self.module.trainer.callbacks)
        order_launches_of_nccl()
        if self.num_nodes == 1:
            use_loopback_for_gloo()
        try:
            super().setup_environment()
        except (DistNetworkError, DistStoreError) as error:
            raise TimeoutError(
                f"the ranks did not find each other within {self.start_timeout.total_seconds():g} s; start all of "
                "them, and check that each can reach MASTER_ADDR; a larger strategy.timeout_s lets them wait longer"
            ) from error
        if self.context.mesh is None:
            ep_size = self.world_size if self.ep_size is None else self.ep_size
            network = self.exchange, self.num_processes, self._say
            self.context = build_context(ep_size, self.root_device, self.timeout, *network)
            self.set_dense_mesh(self.dense, self.dense_estimates)
            self.checkpoints = Checkpoints(self.context, self.async_checkpoint, self.full_checkpoint)
        self.module.parallel_context = self.context

    def setup(self, trainer: Any) -> None:
        self.barrier()
        set_default_timeout(self.timeout)
        check_experts(self.module, self.context)
        if self.context.ep_size > 1 and any(isinstance(callback, ModelSummary) for callback in trainer.callbacks):
            rank_zero_info(f"The model summary counts this rank's experts: 1 of {self.context.ep_size} parts of them.")
        # else DDP would overwrite every rank's experts with rank 0's, then average gradients of different experts
        hide_from_ddp(self.module, [name for name, _ in expert_parameters(self.module)])
        if is_paced(self.reductions, self.root_device):
            prefer_buckets(self, BUCKET_MB)
        super().setup(trainer)
        if self.debug_collectives:
            compare = CompareCollectives(self.timeout)
            compare.install()
            self.at_teardown.callback(compare.remove)
        if is_fitting(trainer):
            self.trained, self.in_training = self.module, True
            trainer.callbacks.append(postponed := SavePostponed())  # last, as all state of the step is then complete
            self.at_teardown.callback(trainer.callbacks.remove, postponed)
            shards = [] if self.is_split else [p for _, p in expert_parameters(self.module)]
            paced = is_paced(self.reductions, self.root_device) and not self.is_split  # which auto decides in `setup`
            pacer = self.at_teardown.enter_context(pacing(self.model, self.context)) if paced else None
            self.reducer = ExpertGradientReducer(shards, self.context, pacer)
            self.at_teardown.callback(self.reducer.remove)
            self.at_teardown.callback(guard_updates(self.precision_plugin, self.module, self.context).remove)
            torch.cuda.manual_seed(self._seed_of_rank())

    def on_train_start(self) -> None:
        super().on_train_start()
        check_can_be_saved(self.module.trainer)
        check_experts(self.module, self.context)
        known = {*self.reducer.shards}
        new = {name: p for name, p in expert_parameters(self.module) if p.requires_grad and p not in known}
        added = [name for name, p in new.items() if not isinstance(p, DTensor)]
        if added:
            raise ValueError(f"{added[0]} was added after fit had begun, allowed: in configure_model or setup")

    def _seed_of_rank(self) -> int:
        return int(torch.randint(2**62, (), device="cpu")) + self.global_rank

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Inside, ranks draw different numbers, for dropout and gate noise. Outside, they draw equal ones: each rank
        draws the order of all samples and takes its share of them."""
        seed = self._seed_of_rank()
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            return super().training_step(*args, **kwargs)

    def teardown(self) -> None:
        self.in_training = False
        super().teardown()
        self.at_teardown.close()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self.reducer.enabled = False
        try:
            with super().block_backward_sync():
                yield
        finally:
            self.reducer.enabled = True

    @DDPStrategy.precision_plugin.setter  # type: ignore[attr-defined]
    def precision_plugin(self, plugin: Precision | None) -> None:
        check_precision(plugin)
        DDPStrategy.precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]

    def save_checkpoint(self, state: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise ValueError("storage_options is not supported: a checkpoint is a local directory; leave it out")
        if self.is_alone:
            why = "saving takes all ranks, and this rank does not know where the others are"
            warnings.warn(f"no checkpoint is saved after an exception: {why}", stacklevel=1)
            return
        path = Path(self.broadcast(filepath))
        if accumulated_batches(self.module.trainer) and self.takes_steps:
            rank_zero_warn("a checkpoint inside a step is saved at its end, as gradients are in no checkpoint")
            self.checkpoints.postponed[path] = "optimizer_states" not in state
            return
        self.checkpoints.save(path, state | {"tied_weights": tied_weights(self.module)})
        if not self.takes_steps:  # else nothing would complete it
            self.checkpoints.finish()

    @property
    def takes_steps(self) -> bool:
        """Whether a training goes on, so that a save may be completed later."""
        return self.in_training and not was_interrupted(self.module.trainer)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_alone:
            return
        if is_of_trainer(Path(filepath), self.module.trainer):
            self.checkpoints.remove(Path(filepath))
        else:
            rank_zero_warn(f"{filepath} is not removed: it is outside the folders of this Trainer's checkpoints")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return model_state(self.module, self.context)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer_state(self.module, optimizer, self.context)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read weights and optimizer state in place and return the rest. Nothing in the files can execute code."""
        if not is_fitting(self.module.trainer):
            self.trained = None
        optimizers = self.optimizers if is_fitting(self.module.trainer) else []
        path = Path(self.broadcast(checkpoint_path))
        return self.checkpoints.load(path, self.module, optimizers, self.module.strict_loading)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing: load_checkpoint has read the weights already."""


def is_of_trainer(path: Path, trainer: Any) -> bool:
    """Return whether a checkpoint is in a folder of this Trainer. Its path may be from a file of another person."""
    folders = [folder for c in trainer.checkpoint_callbacks if (folder := getattr(c, "dirpath", None))]
    inside = any(Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(f)) for f in folders)
    of_tuner = path.parent == Path(trainer.default_root_dir)
    return path.name != ".." and (inside or of_tuner)


class SavePostponed(Callback):
    """Saves what was requested inside a step: once it is taken, or at the end of a training that ends inside it."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not accumulated_batches(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        if accumulated_batches(trainer) and trainer.strategy.checkpoints.postponed:
            rank_zero_warn("training ended inside a step: checkpoints hold the step before, without its gradients")
        trainer.strategy.in_training = False
        self.save(trainer)

    def save(self, trainer: Any) -> None:
        postponed = trainer.strategy.checkpoints.postponed
        while postponed:
            path = next(iter(postponed))
            trainer.save_checkpoint(path, postponed.pop(path))
