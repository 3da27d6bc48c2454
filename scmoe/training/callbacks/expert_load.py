"""Logs how evenly the routers load the experts, and warns when a router collapses."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from scmoe.moe.balance import load_metrics
from scmoe.training.callbacks.collapse import CollapseAlarm
from scmoe.training.callbacks.log_lines import logs_now


class ExpertLoad(Callback):
    """Logs moe/load_max, moe/load_entropy, moe/dead_experts and moe/drop_share over the batches since the last log."""

    def __init__(self) -> None:
        self.sums_LE2: Tensor | None = None
        self.alarm = CollapseAlarm()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sums_LE2 = outputs["load_sums_LE2"]
        if sums_LE2 is None:
            return
        self.sums_LE2 = sums_LE2 if self.sums_LE2 is None else self.sums_LE2 + sums_LE2
        if logs_now(trainer, batch_idx):
            load = load_metrics(self.sums_LE2)
            pl_module.log_dict({f"moe/{name}": value.float() for name, value in load.items()})
            for line in self.alarm(self.sums_LE2):
                rank_zero_warn(line)
            self.sums_LE2 = None
