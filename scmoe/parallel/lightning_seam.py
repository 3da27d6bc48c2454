"""Where a training stands in its steps, as Lightning's loops have it, and what checkpoints say of that (faults 8, 12).

trainer: Lightning's. All of this is of its inner life, and held by tests/unit/test_private_names.py.
"""

from __future__ import annotations

from typing import Any


def is_fitting(trainer: Any) -> bool:
    return bool(trainer.state.fn == "fit")


def accumulated_batches(trainer: Any) -> int:
    """How many batches of this training have left gradients that are not in the weights yet."""
    done = trainer.fit_loop.epoch_loop.batch_progress
    stepped = done.is_last_batch and done.current.processed == done.current.ready
    if not is_fitting(trainer) or stepped:
        return 0
    return int(done.current.processed % trainer.accumulate_grad_batches)


def refuse_between_batches_of_a_step(trainer: Any) -> None:
    """Gradients are in no checkpoint: those accumulated so far would be lost, and the resumed run another one."""
    if accumulated := accumulated_batches(trainer):
        raise ValueError(
            f"a checkpoint after {accumulated} of the {trainer.accumulate_grad_batches} batches of a step would lose "
            "their gradients, allowed: after a step; ModelCheckpoint(every_n_train_steps=...) saves there"
        )


def begin_validation_anew(trainer: Any) -> None:
    """A checkpoint of now says of the validation that is on that it has just begun: a resumed run does all of it. Of a
    sanity check it says nothing."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    if is_fitting(trainer) and (trainer.validating or trainer.sanity_checking):
        progress.reset()
    if is_fitting(trainer) and trainer.validating:
        progress.increment_ready()
        progress.increment_started()


def note_saved_step(trainer: Any) -> None:
    """Before the first batch. A resumed ModelCheckpoint does not know that its step is saved: it would save anew after
    that batch, which with accumulation is in the middle of a step, over the checkpoint that the run goes on from. Not
    earlier: a validation that is done over may find the step to be the best."""
    for callback in trainer.checkpoint_callbacks:
        if hasattr(callback, "_last_global_step_saved"):
            callback._last_global_step_saved = trainer.global_step


def log_under_step(trainer: Any, step: int) -> None:
    """Make the loggers' next row that of `step`."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step
