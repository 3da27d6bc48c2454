"""How far the Trainer is, and what its plugins do in a step: its loops, DDP, precision plugins."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.trainer.states import TrainerStatus
from torch.optim import Optimizer


def is_fitting(trainer: Any) -> bool:
    """Return whether the Trainer runs `fit`, its validations and sanity check included."""
    return bool(trainer.state.fn == "fit")


def without_inference_mode(trainer: Any) -> None:
    """Let validation, test and prediction run under no_grad.

    In inference mode, which Lightning uses where the backend is not gloo, FSDP cannot gather
    weights.
    """
    # that of fit uses no_grad
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def was_interrupted(trainer: Any) -> bool:
    """Return whether the Trainer's run has ended with an exception on this rank."""
    return bool(trainer.state.status == TrainerStatus.INTERRUPTED)


def accumulated_batches(trainer: Any) -> int:
    """Return how many batches have left gradients that no update has used yet."""
    done = trainer.fit_loop.epoch_loop.batch_progress
    stepped = done.is_last_batch and done.current.processed == done.current.ready
    if not is_fitting(trainer) or stepped:
        return 0
    return int(done.current.processed % trainer.accumulate_grad_batches)


def validates_next(trainer: Any) -> bool:
    """Return, at the end of a batch, whether a validation follows it."""
    fit_loop = trainer.fit_loop
    return bool(fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher))


def restart_validation(trainer: Any) -> None:
    """Reset the progress of the running validation.

    A run that is resumed from a checkpoint saved now does all of it. A sanity check leaves no trace
    in a checkpoint.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    if is_fitting(trainer) and (trainer.validating or trainer.sanity_checking):
        progress.reset()
    if is_fitting(trainer) and trainer.validating:
        progress.increment_ready()
        progress.increment_started()


@contextmanager
def leaving_validation(trainer: Any) -> Iterator[None]:
    """Let a checkpoint that is saved inside, as a validation begins, say that it is left to do."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    before = progress.state_dict()
    restart_validation(trainer)
    try:
        yield
    finally:
        progress.load_state_dict(before)


def validation_is_left(state: Mapping[str, Any]) -> bool:
    """Return whether a validation is left to do in a checkpoint, as `restart_validation` marks it.

    state: Lightning's, without tensors.
    """
    return _is_left(state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"])


def _is_left(batches: Mapping[str, int]) -> bool:
    is_begun = batches["ready"] == batches["started"] == batches["processed"] + 1
    return is_begun and batches["completed"] == batches["processed"]


def last_step_to_validate(trainer: Any, state: Mapping[str, Any]) -> int | None:
    """Return max_steps if a checkpoint has all steps, and the validation of the last one is left.

    Lightning's loop would not begin again.
    """
    max_steps = trainer.fit_loop.max_steps
    is_last = is_fitting(trainer) and state.get("global_step") == max_steps
    return int(max_steps) if is_last and validation_is_left(state) else None


def forget_undue_validation(trainer: Any) -> bool:
    """Forget a validation that is left, as a training starts, if that training does not do it.

    It validates after other steps now, or no more. Its own checkpoints must not say that a
    validation is left. Return whether there was one.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    is_due = validates_next(trainer) and sum(trainer.num_val_batches) > 0
    is_undue = _is_left(progress.state_dict()["total"]) and not is_due
    if is_undue:
        progress.reset()
    return is_undue


def set_max_steps(trainer: Any, max_steps: int) -> None:
    trainer.fit_loop.epoch_loop.max_steps = max_steps


def forget_started_batch(trainer: Any) -> None:
    """Do not count the batch that was started but not run before a stop.

    Lightning places validations by this count.
    """
    trainer.fit_loop.epoch_loop.batch_progress.total.reset_on_restart()


def forget_stopped_validation(trainer: Any) -> None:
    """Subtract the batches of a validation that a stop has cut off from the run's total."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()


def count_steps_from(trainer: Any, step: int) -> None:
    """Let the next row be logged under this step.

    After a stop between two batches Lightning's count is one ahead.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def ddp_arguments(strategy: Any) -> dict[str, Any]:
    """Return the arguments with which DDPStrategy would make its DistributedDataParallel."""
    return {"device_ids": strategy.determine_ddp_device_ids(), **strategy._ddp_kwargs}


def register_ddp_hooks(strategy: Any) -> None:
    """Register the communication hooks that were given to DDPStrategy."""
    strategy._register_ddp_hooks()


def teardown_in_place(strategy: Any) -> None:
    """Tear down what a Strategy has set up, and leave the weights on their devices."""
    strategy.cluster_environment.teardown()
    strategy.precision_plugin.teardown()
    strategy.accelerator.teardown()


def replace_after_closure(plugin: Any, hook: Callable[[Any, Optimizer], None] | None) -> None:
    """Call hook(module, optimizer) after backward and before the update.

    It takes the place of the plugin's own function. None puts that one back.
    """
    vars(plugin).pop("_after_closure", None)
    if hook is not None:
        plugin._after_closure = hook


def original_after_closure(plugin: Any, module: Any, optimizer: Optimizer) -> None:
    """Do what a precision plugin itself does between backward and update.

    It calls hooks, then lets the module clip.
    """
    type(plugin)._after_closure(plugin, module, optimizer)
