"""The LightningModule of image models: cross entropy with soft labels, accuracy."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from scmoe.datamodules.positioned import IGNORE
from scmoe.moe.tokens import RouterStats
from scmoe.training.moe_module import MoEModule, cross_entropy_sum


class ImageClassifier(MoEModule):
    """Classifies images [B, 3, S, S]. Labels are probabilities [B, C] in training and classes [B] in validation.

    Validation logs val/loss and val/accuracy, over all ranks.
    """

    def __init__(self, *args: Any, num_classes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORE)

    def task_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[RouterStats]]:
        labels_BC = batch["labels"]
        logits_BC, stats = self.model(batch["images"])
        return cross_entropy_sum(logits_BC, labels_BC), torch.full((), len(labels_BC), device=labels_BC.device), stats

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        labels_B = batch["labels"]
        mask_B = labels_B != IGNORE  # filler gives all ranks the same number of batches
        logits_BC, stats = self.model(batch["images"], mask_B)
        self.note_validation(cross_entropy_sum(logits_BC, labels_B), mask_B.sum(), stats)
        self.val_accuracy.update(logits_BC, labels_B)

    def on_validation_epoch_end(self) -> None:
        self.finish_validation()
        self.log("val/accuracy", self.val_accuracy.compute(), prog_bar=True)
        self.val_accuracy.reset()

    def never_decays(self) -> set[nn.Parameter]:
        return getattr(self.model, "no_weight_decay", set)()  # an extension's network may have none
