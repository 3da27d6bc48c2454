"""The LightningModule of language models: next-token loss, perplexity, bits per byte."""

import math
from typing import Any

from torch import Tensor

from scmoe.datamodules.positioned import IGNORE
from scmoe.moe.tokens import RouterStats
from scmoe.training.moe_module import MoEModule, cross_entropy_sum, exact_sum


class LanguageModel(MoEModule):
    """Predicts the next token. Validation logs val/loss, val/perplexity and val/bits_per_byte."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.val_bytes = exact_sum()

    def task_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[RouterStats]]:
        logits_BSV, stats = self.model(batch["input_ids"], batch.get("padding_mask"))
        nats = cross_entropy_sum(logits_BSV.flatten(0, 1), batch["labels"].flatten())
        return nats, (batch["labels"] != IGNORE).sum(), stats

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.note_validation(*self.task_loss(batch))
        self.val_bytes.update(batch["num_bytes"].sum())

    def on_validation_epoch_end(self) -> None:
        nats, tokens = self.finish_validation()
        self.log("val/perplexity", (nats / tokens).exp())
        self.log("val/bits_per_byte", nats / self.val_bytes.compute() / math.log(2))
        self.val_bytes.reset()
