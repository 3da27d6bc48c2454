"""Implements `Trainer(strategy="expert_parallel")`: expert parallelism for `Experts` modules.

Dense weights are under DDP or FSDP2.

Launchers, ranks, the bucketed and overlapped reduction of dense gradients, no_sync and precision
plugins are those of Lightning's DDPStrategy. One class with parts, which each hook names in order:

    job           job.py: ranks start together, and stop at the same step
    wrapped       parallel/update/wrap.py: DDP or FSDP2, and the experts' reducer
    guard         guarded_update.py: one global gradient norm, and no update without a check
    checkpoints   parallel/checkpoint/: can be loaded on any number of ranks
    postponed     trainer_checkpoints.py: a save inside a step waits for its end

The LightningModule finds `self.wire`, which has the rank's place as `wire.mesh`, set before
`configure_model` is called.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from scmoe.lightning.guarded_update import guard_updates
from scmoe.lightning.hung_ranks import end_job_at_exit, note_absent
from scmoe.lightning.job import RunningJob, meeting, prepare_backends, say, time_limits
from scmoe.lightning.random_draws import draw_seed, own_draws
from scmoe.lightning.seam import launch, loops, saves
from scmoe.lightning.trainer_checkpoints import (
    SavePostponed,
    check_can_be_saved,
    read_in_place,
    refuse_load_without_ranks,
    refuse_save,
    remove,
    save_or_postpone,
    warn_of_skipped_save,
)
from scmoe.lightning.unsupported import check_callbacks, check_optimizers, check_precision
from scmoe.parallel.checkpoint.saving import Checkpoints
from scmoe.parallel.checkpoint.state import model_state, optimizer_state
from scmoe.parallel.dense.dense_auto import memory_estimates, memory_of_rank, pick_dense
from scmoe.parallel.dense.sharded import (
    Steps,
    check_dense,
    check_placements,
    hide_own_weights,
    make_equal,
    shard,
    with_dense_mesh,
)
from scmoe.parallel.mesh import (
    Mesh,
    build_mesh,
    check_experts,
    what_prevents_overlap,
    with_kept_groups,
)
from scmoe.parallel.torch_seam import set_default_timeout
from scmoe.parallel.update.wrap import Wrapped, wrap
from scmoe.parallel.wire.wire import Wire


class ExpertParallelStrategy(DDPStrategy):
    """Splits experts over groups of `ep_size` ranks.

    Everything else is replicated on all ranks, or split as well.

    ep_size: number of ranks that share one set of experts; None: all ranks.
    timeout_s: seconds that a collective may take before the job ends with an error. Until all ranks
        have met and built their modules the limit is START_TIMEOUT_S of job.py, if that is
        longer.
    async_checkpoint: training continues while a checkpoint is written; the files are complete some
        steps later.
    dense: "replicated": dense weights on all ranks, under DDP. "sharded": over all ranks, and
        experts over the ranks that hold the same ones, under FSDP2. "hybrid": over the ranks of a
        node, with a copy on each node. "auto": the first of replicated, hybrid and sharded that a
        rank's memory has room for.
    dense_estimates: for auto, bytes that a rank needs in each mode; None: twice the weights,
        gradients and AdamW's moments.
    ddp: further arguments of DDPStrategy.

    Lightning finds out who starts the ranks: torchrun or SLURM if their environment variables are
    set, else this process. With start_method="popen" (the default) this process is rank 0 and runs
    its own command again for each other rank. With "spawn" (the module must be picklable) or "fork"
    (for notebooks) all ranks are child processes, which end with `fit`. Afterwards this process has
    the metrics and the checkpoints, but not the trained weights. Send a SIGTERM to the children; on
    it, this process ends with an error instead of exit code 143.

    A rank that has raised takes part in no further collective: the other ranks may be anywhere, and
    waiting for them would hide the error. Callbacks that save after an exception
    (OnExceptionCheckpoint, ModelCheckpoint(save_on_exception=True)) find every collective skipped.
    """

    # shards, optimizers and groups must exist before a checkpoint can be read
    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = False  # load_checkpoint does it

    def __init__(
        self,
        ep_size: int | None = None,
        timeout_s: float = 300.0,
        async_checkpoint: bool = False,
        dense: str = "replicated",
        dense_estimates: Mapping[str, float] | None = None,
        **ddp: Any,
    ) -> None:
        if ep_size is not None and ep_size < 1:
            raise ValueError(f"ep_size is {ep_size}, allowed: None or a number of ranks, 1 or more")
        self.timeout, self.start_timeout = time_limits(timeout_s)
        check_dense(dense, ddp)
        super().__init__(**{**ddp, "timeout": self.start_timeout})
        self.ep_size = ep_size
        self.dense = dense
        self.dense_estimates = dense_estimates
        self.async_checkpoint = async_checkpoint
        self.wire = Wire()
        self.job = RunningJob()
        self.wrapped: Wrapped
        self.checkpoints: Checkpoints
        self.started_by: Any = None  # Lightning's launcher of ranks, or the one in its place
        self.parent: int | None = None  # id of local rank 0's process, if it has started this one
        self.in_training = False  # from `setup` for fit to the end of training
        # removes what `setup` has hooked into the module, the plugin and torch
        self.at_teardown = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle of the Trainer holds: no running job, nothing to undo."""
        idle = {"job": RunningJob(), "at_teardown": ExitStack(), "started_by": None}
        return {**super().__getstate__(), **idle}

    # ------------------------------------------------------------------ the rank and its place

    @property
    def module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def is_launched(self) -> bool:
        """Return whether another rank of this job has started this process.

        Otherwise torchrun or SLURM has.
        """
        return isinstance(self.cluster_environment, LightningEnvironment) and self.local_rank > 0

    @property
    def mesh(self) -> Mesh:
        return self.wire.mesh

    @property
    def is_split(self) -> bool:
        return self.mesh.dense_mesh is not None

    @property
    def launcher(self) -> Any:
        if self.started_by is None:
            self.started_by = launch.own_launcher(self, super().launcher)
        return self.started_by

    def setup_environment(self) -> None:
        check_callbacks(self.module.trainer.callbacks)
        prepare_backends(self.num_nodes, self.at_teardown)
        with meeting(self.start_timeout):
            super().setup_environment()
        if self.is_launched:
            self.parent = os.getppid()
        if self.root_device.type == "cuda":
            for line in what_prevents_overlap():
                say(self.global_rank, f"warning: {line}")
        if self.mesh.device_mesh is None:
            ep_size = self.world_size if self.ep_size is None else self.ep_size
            self._use(Wire(with_kept_groups(build_mesh, ep_size, self.root_device, self.timeout)))
            self._split(self.dense, self.dense_estimates)
            self.checkpoints = Checkpoints(self.mesh, self.async_checkpoint)
        self._use(self.wire)

    def _use(self, wire: Wire) -> None:
        self.wire = self.job.wire = self.module.wire = wire

    def _split(self, how: str, estimates: Mapping[str, float] | None) -> None:
        """Set `mesh.dense_mesh` if dense weights are split. Every rank must call it.

        how: auto is decided by rank 0, from the estimates, and stays open without them.
        """
        if how == "auto" and estimates is not None:
            memory = memory_of_rank(self.root_device, self.num_processes)
            how, why = self.broadcast(pick_dense(estimates, memory))
            say(self.global_rank, f"strategy.dense=auto: dense weights are {how}; {why}")
        if how in ("sharded", "hybrid"):
            layout = (self.mesh, how, self.num_processes, self.root_device, self.timeout)
            self._use(replace(self.wire, mesh=with_kept_groups(with_dense_mesh, *layout)))

    # ------------------------------------------------------------------ setup and teardown

    def setup(self, trainer: Any) -> None:
        self.barrier()
        set_default_timeout(self.timeout)
        check_experts(self.module, self.mesh)
        self.job.open(trainer, self.checkpoints, self.is_launched)
        super().setup(trainer)  # calls model_to_device and, for fit, configure_ddp
        make_equal(self.module, self.mesh)
        if self.is_split:
            loops.without_inference_mode(trainer)
            # so that hooks of FSDP on the LightningModule itself run around its steps
            self.model = Steps(self.module)
        if loops.is_fitting(trainer):
            self._set_up_fit(trainer)

    def _set_up_fit(self, trainer: Any) -> None:
        check_optimizers(self.optimizers, self.module, self.mesh)
        self.job.trained = self.module
        self.in_training = True

        postponed = SavePostponed()
        trainer.callbacks.append(postponed)  # last, as all state of the step is then complete
        self.at_teardown.callback(trainer.callbacks.remove, postponed)
        self.at_teardown.callback(saves.await_saves(trainer, self.checkpoints))

        guarded = guard_updates(self.precision_plugin, self.module, self.mesh)
        self.at_teardown.callback(guarded.remove)
        torch.cuda.manual_seed(draw_seed())

    def model_to_device(self) -> None:
        if self.dense == "auto" and self.dense_estimates is None and not self.is_split:
            self._split("auto", memory_estimates(self.module, self.mesh, self.num_processes))
            self.checkpoints.mesh = self.mesh  # it was made before the weights were split
        if self.is_split and not any(isinstance(p, DTensor) for p in self.module.parameters()):
            shard(self.module, self.mesh, self.precision_plugin.precision)
        check_placements(self.module, self.mesh)
        hide_own_weights(self.module, self.is_split)
        super().model_to_device()

    def configure_ddp(self) -> None:
        if self.is_split:
            self.wrapped = wrap(self.module, self.mesh)
        else:
            ddp = loops.ddp_arguments(self)
            self.wrapped = wrap(self.module, self.mesh, **ddp)
            self.model = self.wrapped.module
            if isinstance(self.model, DistributedDataParallel):  # else the experts train alone
                loops.register_ddp_hooks(self)
        self.at_teardown.callback(self.wrapped.close)

    def teardown(self) -> None:
        self.in_training = False
        self.job.close()
        if self.is_split:  # DDP's moves weights to the CPU, away from the mesh that they belong to
            loops.teardown_in_place(self)
        else:
            super().teardown()
        self.at_teardown.close()

    @DDPStrategy.precision_plugin.setter  # type: ignore[attr-defined]
    def precision_plugin(self, plugin: Precision | None) -> None:
        check_precision(plugin)
        DDPStrategy.precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ steps

    def on_train_start(self) -> None:
        self.job.begin_training()
        check_can_be_saved(self.module.trainer)
        saves.end_restart_of_finetuning(self.module.trainer)
        check_experts(self.module, self.mesh)
        self.wrapped.check_late_experts(self.module)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.job.begin_batch(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.job.begin_validation()

    def on_test_start(self) -> None:
        self.job.begin("test", self.module.trainer.num_test_batches)

    def on_predict_start(self) -> None:
        self.job.begin("predict", self.module.trainer.num_predict_batches)

    def on_validation_end(self) -> None:
        self.job.end_evaluation()

    on_test_end = on_predict_end = on_validation_end

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step, in which ranks draw different numbers (dropout, gate noise).

        Outside of it they draw equal ones: each rank draws the order of all samples and takes its
        share of them.
        """
        with own_draws(self.global_rank, self.root_device):
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self.job.begin_evaluated_batch(args)
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self.job.begin_evaluated_batch(args)
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self.job.begin_evaluated_batch(args)
        return super().predict_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(self.wrapped.own_part(closure_loss), *args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with self.wrapped.no_sync():
            yield

    # ------------------------------------------------------------------ a rank that has raised

    @property
    def is_alone(self) -> bool:
        """Return whether this rank has raised and the other ranks may not know of it."""
        return self.mesh.world_size > 1 and loops.was_interrupted(self.module.trainer)

    @property
    def is_global_zero(self) -> bool:
        """Return False on every rank that is alone.

        It must not remove or link checkpoints, because the save was skipped.
        """
        return super().is_global_zero and not self.is_alone

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self.is_alone:
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self.is_alone else super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if self.is_alone else super().reduce(tensor, *args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.mesh.world_size > 1:
            absent = note_absent(exception, self.mesh)
            end_job_at_exit(launch.started_ranks(self), absent, self.parent)

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(
        self, state: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        refuse_save(self.mesh, storage_options)
        if self.is_alone:
            warn_of_skipped_save()
            return
        path = self.broadcast(filepath)
        save_or_postpone(path, state, self.module, self.checkpoints, self.mesh, self.takes_steps)

    @property
    def takes_steps(self) -> bool:
        """Return whether a training goes on, so that a save may be completed later."""
        return self.in_training and not loops.was_interrupted(self.module.trainer)

    def remove_checkpoint(self, filepath: Any) -> None:
        if not self.is_alone:
            remove(filepath, self.module.trainer, self.checkpoints)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's weights and buffers. Raise RuntimeError where this is no rank."""
        refuse_save(self.mesh)
        return model_state(self.module, self.mesh)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer_state(self.module, optimizer, self.mesh)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read weights and optimizer state in place; return the rest. No file can execute code."""
        refuse_load_without_ranks(self.mesh)
        trainer = self.module.trainer
        path = self.broadcast(checkpoint_path)
        if not loops.is_fitting(trainer):
            self.job.trained = None
        optimizers = self.optimizers if loops.is_fitting(trainer) else []
        state = read_in_place(path, trainer, self.checkpoints, optimizers)
        self.job.resume(state)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing: load_checkpoint has read the weights already."""
