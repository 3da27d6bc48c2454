"""The loss of the whole test split, computed as a validation of one rank computes it.

The windows of a text do not overlap, and experts have the run's own capacity. Images have two splits: there the test
split is the one of validation, whole.
"""

import math
from typing import Any

import torch

from scmoe.datamodules.positioned import IGNORE, PositionedDataModule
from scmoe.datamodules.sequences import SequenceDataModule
from scmoe.runs.evaluate.rank_zero import Forward
from scmoe.training.moe_module import cross_entropy_sum


def score_test_split(forward: Forward, data: PositionedDataModule, device: torch.device) -> dict[str, Any]:
    """Return the loss in nats per token (image), and bits per byte of text or the accuracy of images."""
    of_text = isinstance(data, SequenceDataModule)
    nats, hits, targets, num_bytes = 0.0, 0, 0, 0
    for batch in data.test_dataloader():
        inputs, labels = batch["input_ids" if of_text else "images"], batch["labels"]
        mask = batch["padding_mask"] if of_text else labels != IGNORE
        logits_NC = forward(inputs.to(device), mask.to(device))[0].flatten(0, -2)
        labels_N = labels.flatten().to(device)
        nats += cross_entropy_sum(logits_NC, labels_N).item()
        hits += int((logits_NC.argmax(-1) == labels_N).sum())
        targets += int((labels_N != IGNORE).sum())
        num_bytes += int(batch["num_bytes"].sum()) if of_text else 0
    loss = nats / targets
    if of_text:
        return {"split": "test", "loss": loss, "tokens": targets, "bits_per_byte": nats / num_bytes / math.log(2)}
    return {"split": "val", "loss": loss, "images": targets, "accuracy": hits / targets}
