"""The progress bar shows each metric, and reads logged losses alone."""

import re
from io import StringIO
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from scmoe.lightning.seam.progress_bar import StepProgressBar


def train(model: BoringModel, bar: StepProgressBar, **options: Any) -> None:
    off = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(limit_val_batches=0, callbacks=[bar], accelerator="cpu", **off, **options).fit(model)


def test_a_narrow_terminal_shows_each_metric_beside_its_value(monkeypatch):
    class Model(BoringModel):
        def training_step(self, batch, index):
            self.log_dict({"train/loss": 5.198, "time/tokens_per_s": 6541.845}, prog_bar=True)
            return super().training_step(batch, index)

    monkeypatch.setenv("COLUMNS", "80")
    bar, written = StepProgressBar(), StringIO()
    bar._console_kwargs = {"file": written, "width": 80, "force_terminal": True}
    train(Model(), bar, max_steps=3)
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", written.getvalue()).splitlines()
    for shown in ("train/loss: 5.198", "time/tokens_per_s: 6541.845"):
        assert any(line.rstrip().endswith(shown) for line in lines), shown


def test_the_progress_bar_reads_the_loss_of_logged_steps_alone():
    """Reading it waits for the device. The first step's loss is shown, so the bar is not empty."""

    class Model(BoringModel):
        def training_step(self, batch, index):
            self.log("train/loss", torch.tensor(float(index)))
            return super().training_step(batch, index)

    class Bar(StepProgressBar):
        def get_metrics(self, *arguments):
            seen.append(super().get_metrics(*arguments))
            return seen[-1]

    seen: list[dict[str, float]] = []
    train(Model(), Bar(), max_steps=7, log_every_n_steps=3)
    assert [shown["train/loss"] for shown in seen[:7]] == [0, 0, 2, 2, 2, 5, 5]
