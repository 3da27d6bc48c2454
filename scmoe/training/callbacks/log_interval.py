"""Says at which batches the callbacks log."""

from lightning.pytorch import Trainer


def logs_now(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of every log_every_n_steps-th optimizer step."""
    steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
    return rest == 0 and steps % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
