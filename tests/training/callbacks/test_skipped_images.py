"""Images that cannot be read are counted in the metrics and the summary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule

from scmoe.training.callbacks.skipped_images import SkippedImages

pytestmark = [pytest.mark.faults, pytest.mark.representative]


def test_the_count_of_skipped_images_is_logged_and_in_the_summary():
    """Two ranks have met 2 and 3 of them."""

    class Module(LightningModule):
        wire = SimpleNamespace(mesh=SimpleNamespace(sum_over_ranks=lambda count: count + 3))
        logged: ClassVar[dict[str, float]] = {}

        def log(self, name: str, value: float) -> None:  # type: ignore[override]
            self.logged[name] = value

    counted, module = SkippedImages(), Module()
    trainer = SimpleNamespace(log_every_n_steps=1, global_step=1, accumulate_grad_batches=1)
    counted.on_validation_batch_end(trainer, module, None, {"skipped": torch.tensor([0, 1])}, 0)  # type: ignore
    counted.on_train_batch_end(trainer, module, None, {"skipped": torch.tensor([1, 0])}, 0)  # type: ignore
    assert module.logged == {"data/skipped": 5.0} and counted.total(module) == 5


def test_a_resumed_run_goes_on_counting_skipped_images():
    def sum_of_ranks(count, reduce_op):
        return count.add_(3)

    strategy, checkpoint = (
        SimpleNamespace(reduce=sum_of_ranks, root_device=torch.device("cpu")),
        dict[str, int](),
    )
    counted = [SkippedImages() for _ in range(3)]
    counted[0].count({"skipped": torch.tensor([1, 1])})
    counted[0].on_save_checkpoint(SimpleNamespace(strategy=strategy), None, checkpoint)  # type: ignore
    for rank in (0, 1):
        counted[1 + rank].on_load_checkpoint(
            SimpleNamespace(is_global_zero=rank == 0), None, checkpoint
        )  # type: ignore
    assert [int(c.of_rank) for c in counted] == [2, 5, 0]


def test_batches_of_an_extension_need_not_say_what_was_skipped():
    counted = SkippedImages()
    counted.count({"images": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2, 5)})
    assert int(counted.of_rank) == 0


def test_a_resumed_count_is_summed_where_the_ranks_can_sum_it():
    """NCCL sums nothing on the host. Here the device is torch's that holds no numbers."""
    devices = []

    def sum_over_ranks(count):
        devices.append(count.device.type)
        return torch.tensor(5)

    mesh = SimpleNamespace(sum_over_ranks=sum_over_ranks)
    module = SimpleNamespace(device=torch.device("meta"), wire=SimpleNamespace(mesh=mesh))
    assert SkippedImages().total(module) == 5 and devices == ["meta"]
