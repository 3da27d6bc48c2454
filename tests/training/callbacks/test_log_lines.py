"""Without a terminal a run prints lines."""

from types import SimpleNamespace
from typing import Any

from scmoe.training.callbacks.log_lines import LogLines


def test_without_a_terminal_a_validation_has_a_line_of_its_own(capsys):
    shown = {
        "progress_bar_metrics": {"val/loss": 2.0},
        "logged_metrics": {"train/loss": 3.0, "train/lr": 1e-3},
    }
    numbers = {
        "global_step": 4,
        "max_steps": 8,
        "accumulate_grad_batches": 1,
        "log_every_n_steps": 1,
    }
    trainer: Any = SimpleNamespace(**numbers, is_global_zero=True, **shown)
    module: Any = None
    LogLines().on_train_batch_end(trainer, module, None, None, 3)
    LogLines().on_validation_end(trainer, module)
    assert capsys.readouterr().err.splitlines() == [
        "step 4/8  train/loss 3",
        "step 4/8  val/loss 2",
    ]
