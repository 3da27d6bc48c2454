"""The LightningModule adds up validations exactly, and clips in every precision."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.modules import ImageClassifier
from tests.support.models import tiny


def test_a_validation_adds_up_in_float64_where_the_module_is_in_bfloat16():
    """In bfloat16 a sum of 1,000 batches of 2,048 targets would stop at 524,288."""
    module = build_module(tiny()).to(torch.bfloat16)
    module.on_validation_epoch_start()
    for _ in range(1000):
        module.note_validation(torch.tensor(1.25), torch.tensor(2048), [])
    assert (float(module.val_nats.compute()), int(module.val_targets.compute())) == (
        1250.0,
        2_048_000,
    )


@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed"))
def test_the_norm_is_clipped_in_every_precision(precision):
    """Lightning's plugin of bf16-mixed does not clip for a fused AdamW; this library clips by
    itself."""
    config = tiny("trainer.gradient_clip=0.001", "data.global_batch_size=4", "trainer.max_steps=2")
    module, norms = build_module(config), []

    def note(*_):
        left = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
        norms.append((float(module.trainer.callback_metrics["train/grad_norm"]), float(left)))

    module.on_train_batch_end = note
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        accelerator="cpu", precision=precision, max_steps=2, limit_val_batches=0, **quiet
    )
    trainer.fit(module, build_datamodule(config))
    assert len(norms) == 2
    for before, left in norms:
        # torch adds 1e-6 to the norm
        assert before > 0.01 and left == pytest.approx(0.001, rel=1e-3)


def test_a_nan_in_a_validation_is_no_better_loss():
    """torchmetrics leaves NaN out by default, and its targets would count all the same."""
    module = build_module(tiny())
    for nats in (3.0, float("nan")):
        module.note_validation(torch.tensor(nats), torch.tensor(2), [])
    assert module.val_nats.compute().isnan() and module.val_targets.compute() == 4


def test_labels_that_bf16_true_has_rounded_are_probabilities_again():
    """All classes are equally likely to the model, so its loss is ln C for every label."""
    module = ImageClassifier(lambda wire: None, max_steps=1, num_classes=1000)
    module.model = lambda images: (torch.zeros(1, 1000), [])
    labels_BC = torch.full((1, 1000), 1e-4)
    labels_BC[0, 3] += 0.9
    batch = {"images": torch.zeros(1), "labels": labels_BC.bfloat16()}
    nats, _, _ = module.task_loss(batch)
    assert float(nats) == pytest.approx(math.log(1000), rel=1e-5)


def test_a_validation_that_was_cut_off_counts_in_no_later_one():
    """After Ctrl-C in a notebook the same module may go on."""
    module = build_module(tiny())
    for nats in (3.0, 1.0):
        module.on_validation_epoch_start()
        module.note_validation(torch.tensor(nats), torch.tensor(2), [])
        module.val_bytes.update(torch.tensor(4))
    assert (float(module.val_nats.compute()), int(module.val_targets.compute())) == (1.0, 2)
    assert int(module.val_bytes.compute()) == 4
