"""Ranks start together, with equally many batches, and stop together, at the same step (faults 12 and 16).

A SIGTERM on one rank ends all ranks with exit code 143, Ctrl-C with 130, and, if they were training, with one complete
checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scmoe.lightning import seam as seam
from scmoe.lightning.dense_strategy import DenseWeightsStrategy
from scmoe.lightning.stop_signal import Poll, StopSignal
from scmoe.parallel.checkpoint.saving import Checkpoints
from scmoe.parallel.dense_shards import reshard
from scmoe.parallel.mesh import ParallelContext


def check_even(stage: str, batches: Sequence[float], context: ParallelContext) -> None:
    """Raise ValueError on every rank if ranks have different numbers of batches. Every rank must call it.

    A rank without a next batch would leave the others waiting in a collective until the timeout.
    batches: one number for each loader; inf if its length is unknown.
    """
    if context.world_size == 1:
        return
    of_ranks: list[Any] = [None] * context.world_size
    dist.all_gather_object(of_ranks, [float(n) for n in batches], group=context.control_group)
    if any(counts != of_ranks[0] for counts in of_ranks):
        counts = "; ".join(f"rank {rank}: {' + '.join(f'{n:g}' for n in ns)}" for rank, ns in enumerate(of_ranks))
        raise ValueError(
            f"ranks have different numbers of {stage} batches ({counts}), allowed: the same number on each rank; "
            f"pad the last batches, or set limit_{stage}_batches"
        )


class LockstepStrategy(DenseWeightsStrategy):
    """DDP whose ranks ask each other at every step whether one must stop, and read the answer one step later.

    `checkpoints` must be set before `setup`. DDPStrategy's hooks `on_..._start` and `on_..._end` do nothing.
    """

    def __init__(self, **ddp: Any) -> None:
        super().__init__(**ddp)
        self.checkpoints: Checkpoints
        self.poll: Poll
        self.stop = StopSignal()
        self.trained: Any = None  # the module, while it holds the weights of its last step of training
        self.has_begun = False  # the first batch of this training
        self.polls_left = 0  # batches of this validation, test or prediction at which all ranks can still ask

    def setup(self, trainer: Any) -> None:
        self.stop, self.poll = StopSignal(), Poll(self.context.control_group, num_flags=2)
        self.stop.take()
        seam.leave_stop_signals_alone(trainer)
        super().setup(trainer)

    def on_train_start(self) -> None:
        check_even("train", [self.module.trainer.num_training_batches], self.context)
        self.has_begun = False
        self.ask()  # so that no rank begins the first batch if one was stopped before it
        seam.skip_sigterm_broadcast(self.module.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.module.trainer.accumulate_grad_batches == 0:
            self.ask()
        self.checkpoints.restore_random_state()  # not earlier: making data loaders draws from the generator
        if not self.has_begun:  # not earlier: a validation that runs again may find this step to be the best
            self.has_begun = True
            seam.mark_step_as_saved(self.module.trainer)

    def on_validation_start(self) -> None:
        trainer = self.module.trainer
        self._begin("val", trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        if not trainer.sanity_checking:
            seam.forget_stopped_validation(trainer)

    def on_test_start(self) -> None:
        self._begin("test", self.module.trainer.num_test_batches)

    def on_predict_start(self) -> None:
        self._begin("predict", self.module.trainer.num_predict_batches)

    def _begin(self, stage: str, batches: Sequence[float]) -> None:
        """Let ranks ask at as many batches as the rank with the fewest has. If that number is unknown they cannot ask,
        and a SIGTERM ends the process at once."""
        if self.context.ep_size > 1 or self.context.dense_mesh is not None:  # else nothing keeps ranks in step
            check_even(stage, batches, self.context)
        fewest = self.poll.smallest(sum(batches))
        can_stop = not seam.accumulated_batches(self.module.trainer)  # else the step must end first
        if fewest == float("inf"):
            if can_stop:
                self.ask_and_wait()
            self.stop.give_back()
        elif can_stop:
            self.polls_left = int(fewest)

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
            self.ask()

    def on_validation_end(self) -> None:
        self.polls_left = 0
        self.stop.take()
        reshard(self.module)  # what follows finds the weights that optimizers hold

    on_test_end = on_predict_end = on_validation_end

    def ask(self) -> None:
        """Ask all ranks whether one still writes a checkpoint or must stop, and act on the answers of the last call."""
        still_writing, stop = self.poll.any_rank(self.checkpoints.is_writing(), self.stop.received)
        self.checkpoints.finish_unless(still_writing)
        if stop:
            self._save_and_exit()

    def ask_and_wait(self) -> None:
        """Ask once all ranks are here, and act on the answer at once."""
        self.barrier()
        self.ask()
        self.ask()

    def _save_and_exit(self) -> None:
        """Save a checkpoint, if there is anything new to save, and exit; all ranks do this at the same step.

        A rank that Lightning's launcher has started exits with 0: any other code would make the launcher kill rank 0,
        which may still be closing loggers.
        """
        trainer = self.module.trainer
        if self.trained is self.module and not seam.accumulated_batches(trainer):
            self.checkpoints.restore_random_state()
            seam.restart_validation(trainer)
            seam.forget_started_batch(trainer)
            if isinstance(last := trainer.checkpoint_callback, seam.LastCheckpoint):
                last.save(trainer)
            else:
                folder = getattr(last, "dirpath", None) or trainer.default_root_dir
                trainer.save_checkpoint(Path(folder) / f"step={trainer.global_step}.ckpt")
        self.checkpoints.finish()
        raise SystemExit(0 if self.is_launched else self.stop.exit_code)

    def teardown(self) -> None:
        if not seam.was_interrupted(self.module.trainer):  # else other ranks may never come here
            self.checkpoints.finish()
            self.ask_and_wait()  # so that a stop during or after the last step still ends in 143
            self.poll.close()
        self.stop.give_back()
        super().teardown()
