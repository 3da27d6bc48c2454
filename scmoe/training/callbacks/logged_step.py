"""Which batches are logged, and under which optimizer step."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from scmoe.parallel.lightning_seam import count_steps_from


class LoggedStep(Callback):
    """Counts from 0, in a resumed run too: after a stop between two batches Lightning's own count is one ahead."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        count_steps_from(trainer, trainer.global_step)


def logs_now(trainer: Trainer, batch_idx: int) -> bool:
    """Return True at the last batch of every log_every_n_steps-th optimizer step."""
    steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
    return rest == 0 and steps % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
