"""`Trainer(strategy="expert_parallel")`: DDP for dense weights, expert parallelism for `Experts` modules.

A DDPStrategy: launchers, ranks, bucketed overlapped reduction of dense gradients, no_sync and precision plugins are
Lightning's. Added: the mesh and its groups before `configure_model`, shards that DDP leaves alone and their own
reducer, one global norm for clipping, different dropout on every rank, and checkpoints that do not depend on the
number of ranks.

The LightningModule finds its place in `self.parallel_context`, set before `configure_model` is called.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_checkpoint
from scmoe.parallel.checkpoint.random_state import set_rng_states
from scmoe.parallel.checkpoint.saving import Saving
from scmoe.parallel.checkpoint.state import model_state, optimizer_state
from scmoe.parallel.job.debug import CompareCollectives
from scmoe.parallel.job.even_batches import check_even
from scmoe.parallel.job.roll_call import note_absent, take_along
from scmoe.parallel.job.stopping import EXIT_CODE, Poll, StopSignal
from scmoe.parallel.lightning_seam import (
    accumulated_batches,
    begin_validation_anew,
    is_fitting,
    note_saved_step,
    refuse_between_batches_of_a_step,
)
from scmoe.parallel.mesh import ParallelContext, build_context, use_loopback_for_gloo
from scmoe.parallel.shards import expert_parameters
from scmoe.parallel.update.clipping import GuardedUpdate
from scmoe.parallel.update.guard import Guard
from scmoe.parallel.update.reducer import ExpertGradientReducer


class ExpertParallelStrategy(DDPStrategy):
    """ep_size: ranks that share one set of experts; None: all ranks.

    timeout_s: seconds that a collective may take before the job is ended.
    async_checkpoint: training goes on while a checkpoint is written; it is in its place some steps later.
    full_checkpoint: rank 0 puts the shards that ranks have written together in one file.
    debug_collectives: ranks compare every collective before they take part in it; slow.

    Who starts the ranks is found out by Lightning: torchrun or SLURM, where their variables are set, else this process.
    It is rank 0 then and runs its own command once more for each other rank (start_method="popen", the default), or
    it starts all ranks as children by start_method="spawn" (the module must pickle) or "fork" (for notebooks). Such
    children end with `fit`, and their weights with them: this process has the metrics and the checkpoints. It is no
    rank either, so a SIGTERM is for the children; it ends with an error then, where otherwise the exit code is 143.
    """

    def __init__(
        self,
        ep_size: int | None = None,
        timeout_s: float = 300.0,
        async_checkpoint: bool = False,
        debug_collectives: bool = False,
        full_checkpoint: bool = False,
        **ddp: Any,
    ) -> None:
        ddp.setdefault("gradient_as_bucket_view", True)
        self.update: GuardedUpdate
        super().__init__(timeout=timedelta(seconds=timeout_s), **ddp)
        self.ep_size, self.debug_collectives = ep_size, debug_collectives
        self.async_checkpoint, self.full_checkpoint = async_checkpoint, full_checkpoint
        self.context: ParallelContext | None = None
        self.compare: CompareCollectives | None = None
        self.reducer: ExpertGradientReducer | None = None
        self.guard: Guard | None = None
        self.stop: StopSignal | None = None
        self.poll: Poll | None = None
        self.saving: Saving | None = None
        self.saving_asked_about: Saving | None = None
        self.outdated: list[Any] = []  # checkpoints to remove once the one that replaces them is whole
        self.rng_states: dict[str, Tensor] | None = None
        self.trained: Any = None  # the module that has the weights of its last step of training, with this optimizer
        self.parent: int | None = None  # the process of local rank 0, where that has started this one
        self.has_begun = False  # the first batch of this training
        self.polls_left = 0  # batches of this validation, test or prediction at which all ranks can ask each other

    # ------------------------------------------------------------------ set-up

    def setup_environment(self) -> None:
        if self.num_nodes == 1:
            use_loopback_for_gloo()
        super().setup_environment()
        if self._is_launched:
            self.parent = os.getppid()
        if self.context is None:
            ep_size = self.world_size if self.ep_size is None else self.ep_size
            assert self._timeout is not None
            self.context = build_context(ep_size, self.root_device, self._timeout)
        self.module.parallel_context = self.context

    @property
    def _is_launched(self) -> bool:
        """Whether a process of this job has started this rank, not torchrun or SLURM."""
        return isinstance(self.cluster_environment, LightningEnvironment) and self.local_rank > 0

    @property
    def module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def setup(self, trainer: Any) -> None:
        assert self.context is not None
        self.stop, self.poll = StopSignal(trainer._signal_connector), Poll(self.context.control_group, num_flags=2)
        self._hide_shards_from_ddp()
        super().setup(trainer)
        if self.debug_collectives:
            assert self._timeout is not None
            self.compare = CompareCollectives(self._timeout)
            self.compare.install()
        if is_fitting(trainer):
            self.trained = self.module
            self.reducer = ExpertGradientReducer([p for _, p in expert_parameters(self.module)], self.context)
            own = getattr(self.module, "guard", None)
            self.guard = own if isinstance(own, Guard) else Guard(self.module)
            self.update.begin(self.module, self.guard, self.context)
            # weights were drawn alike on every rank; what is drawn from here on (dropout, gate noise) must differ
            torch.manual_seed(torch.initial_seed() * 1_000_003 % 2**62 + self.global_rank)

    def _hide_shards_from_ddp(self) -> None:
        """DDP would overwrite every rank's experts with rank 0's, then average different experts' gradients. The names
        replace those of an earlier call, so keep what others have set."""
        names = set(getattr(self.module, "_ddp_params_and_buffers_to_ignore", []))
        names.update(name for name, _ in expert_parameters(self.module))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.module, sorted(names))

    # ------------------------------------------------------------------ gradients

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        assert self.reducer is not None
        with super().block_backward_sync(), self.reducer.no_sync():
            yield

    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self.guard is not None:
            self.guard.note_loss(closure_loss)

    @property
    def precision_plugin(self) -> Precision:
        return DDPStrategy.precision_plugin.fget(self)  # type: ignore[attr-defined]

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if getattr(plugin, "scaler", None) is not None:
            raise ValueError(
                "trainer.precision is 16-mixed, allowed with expert parallelism: 32-true, bf16-mixed, bf16-true, "
                "64-true: an overflow found by one rank alone would make ranks skip different steps"
            )
        if plugin is not None:
            self.update = GuardedUpdate(plugin)
        DDPStrategy.precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, state: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise ValueError("storage_options is not supported: a checkpoint is a local directory")
        if self._is_alone:
            why = "it takes all ranks, and others may not be here"
            warnings.warn(f"no checkpoint is saved after an exception: {why}", stacklevel=1)
            return
        assert self.context is not None
        refuse_between_batches_of_a_step(self.module.trainer)
        self.finish_saving()
        path = Path(self.broadcast(filepath))
        self.saving = Saving(path, state, self.context, self.async_checkpoint, self.full_checkpoint)
        if not self.async_checkpoint:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is still being written, if there is one. Every rank must call it."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.finish()
            outdated, self.outdated = self.outdated, []
            for filepath in outdated:
                self.remove_checkpoint(filepath)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.saving is not None:
            self.outdated.append(filepath)
        elif self.is_global_zero:
            durable.remove(Path(filepath))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.context is not None
        return model_state(self.module, self.context)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.context is not None
        return optimizer_state(self.module, optimizer, self.context)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # shards, optimizers and groups must exist before a checkpoint can be read into them

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.context is not None
        state = load_checkpoint(Path(self.broadcast(checkpoint_path)), self.module, self.optimizers, self.context)
        self.rng_states = state.pop("rng_states", None)
        if not is_fitting(self.module.trainer):
            self.trained = None
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Done by load_checkpoint, in place."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by load_checkpoint, in place."""

    # ------------------------------------------------------------------ steps

    def on_train_start(self) -> None:
        super().on_train_start()
        self._check_even("train", [self.module.trainer.num_training_batches])
        self.has_begun = False
        self._ask_all_ranks()  # so that the first batch is not begun where a rank has been told to stop before it
        # Lightning's own way asks rank 0 before every batch, blocking, and from inside its signal handler
        self.module.trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        at_step_boundary = batch_idx % self.module.trainer.accumulate_grad_batches == 0
        if at_step_boundary:
            self._ask_all_ranks()
        self._restore_rng_states()
        if not self.has_begun:
            self.has_begun = True
            note_saved_step(self.module.trainer)

    def _restore_rng_states(self) -> None:
        """Not before the first step, or what else needs them: making data loaders draws from the generator."""
        if self.rng_states is not None:
            set_rng_states(self.rng_states)
            self.rng_states = None

    def on_validation_start(self) -> None:
        super().on_validation_start()
        trainer = self.module.trainer
        self._begin("val", trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        if not trainer.sanity_checking:  # a validation that was stopped has not been
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()

    def on_test_start(self) -> None:
        super().on_test_start()
        self._begin("test", self.module.trainer.num_test_batches)

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._begin("predict", self.module.trainer.num_predict_batches)

    def _begin(self, what: str, batches_of: Sequence[float]) -> None:
        """Batches without training: all ranks ask each other at as many as the one with the fewest has. Where that is
        not known, they cannot, and a SIGTERM ends the process at once."""
        assert self.poll is not None and self.stop is not None
        self._check_even(what, batches_of)
        batches = self.poll.smallest(sum(batches_of))
        can_stop = not accumulated_batches(self.module.trainer)  # else gradients would be lost: it waits for the step
        if batches == float("inf"):
            if can_stop:
                self._ask_and_wait()
            self.stop.give_back()
        elif can_stop:
            self.polls_left = int(batches)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._end()

    def on_test_end(self) -> None:
        super().on_test_end()
        self._end()

    def on_predict_end(self) -> None:
        super().on_predict_end()
        self._end()

    def _end(self) -> None:
        assert self.stop is not None
        self.polls_left = 0
        self.stop.take()

    def _check_even(self, what: str, batches: Sequence[float]) -> None:
        """Training reduces gradients over all ranks. Else only experts keep ranks in step, where they are shared."""
        assert self.context is not None
        if what == "train" or self.context.ep_size > 1:
            check_even(what, batches, self.context)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._ask_if_all_can()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._ask_if_all_can()
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._ask_if_all_can()
        return super().predict_step(*args, **kwargs)

    def _ask_if_all_can(self) -> None:
        if self.polls_left > 0:
            self.polls_left -= 1
            self._ask_all_ranks()

    def _ask_all_ranks(self) -> None:
        """As of the batch before: is a rank still writing a checkpoint, has a rank been told to stop?"""
        assert self.poll is not None and self.stop is not None
        writing = self.saving is not None and not self.saving.is_written()
        still_writing, stop = self.poll.any_rank(writing, self.stop.received)
        if self.saving is not None and self.saving is self.saving_asked_about and not still_writing:
            self.finish_saving()
        self.saving_asked_about = self.saving
        if stop:
            self._save_and_exit()

    def _ask_and_wait(self) -> None:
        """Once all ranks are here: has one been told to stop up to now?"""
        self.barrier()
        self._ask_all_ranks()
        self._ask_all_ranks()

    def _save_and_exit(self) -> None:
        """Every rank, at the same step: a checkpoint beside the others, then exit. A rank that Lightning's launcher
        has started ends with 0: any other code makes its observer kill rank 0, which may still be closing loggers."""
        trainer = self.module.trainer
        # else nothing was trained, or (where a fit was ended in the middle of a step) it is as in no checkpoint
        if self.trained is self.module and not accumulated_batches(trainer):
            self._restore_rng_states()
            begin_validation_anew(trainer)
            folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
            trainer.save_checkpoint(Path(folder) / f"step={trainer.global_step}.ckpt")
        self.finish_saving()
        raise SystemExit(0 if self._is_launched else EXIT_CODE)

    # ------------------------------------------------------------------ the end

    @property
    def _is_alone(self) -> bool:
        """After an exception on this rank: the others may be anywhere, and waiting for them would hide why. Callbacks
        that save then (OnExceptionCheckpoint, ModelCheckpoint(save_on_exception=True)) find every collective skipped.
        """
        several = self.context is not None and self.context.world_size > 1
        return several and self.module.trainer.state.status == TrainerStatus.INTERRUPTED

    @property
    def is_global_zero(self) -> bool:
        """No rank acts for all once it is alone: a link to a checkpoint, or removing one, would be for a save that was
        skipped."""
        return super().is_global_zero and not self._is_alone

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_alone:
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._is_alone else super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if self._is_alone else super().reduce(tensor, *args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.context is not None and self.context.world_size > 1:
            absent = note_absent(exception, self.context)
            take_along(getattr(self.launcher, "procs", []), absent, self.parent)

    def teardown(self) -> None:
        interrupted = self.module.trainer.state.status == TrainerStatus.INTERRUPTED
        if not interrupted:  # else other ranks may not be here, and waiting for them would hide why
            self.finish_saving()
            if self.poll is not None:
                self._ask_and_wait()  # for the last time: after the last step too a stop ends in 143
                self.poll.close()
        self.poll = None
        if self.stop is not None:
            self.stop.give_back()
            self.stop = None
        if self.reducer is not None:
            self.reducer.remove()
            self.reducer = None
        if self.guard is not None:
            self.guard.remove()
            self.guard = None
        if self.compare is not None:
            self.compare.remove()
            self.compare = None
        super().teardown()


StrategyRegistry.register(
    "expert_parallel", ExpertParallelStrategy, "DDP for dense weights, expert parallelism for experts", override=True
)
