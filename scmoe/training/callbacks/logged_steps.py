"""Where a batch lies in an optimizer step, and whether that step is logged."""

from lightning.pytorch import Trainer


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def logs_now(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of every log_every_n_steps-th optimizer step."""
    steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
    return rest == 0 and steps % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def begins_measured_step(trainer: Trainer, batch_idx: int, every: int) -> bool:
    """Return True at the first batch of every `every`-th optimizer step, from step 0 on."""
    is_first = batch_idx % trainer.accumulate_grad_batches == 0
    return is_first and trainer.global_step % every == 0
