"""Measures Fig. 9 and Fig. 10 during training: at intervals a probe is attached for one batch, then removed.

    <run>/analysis/gating.npz       steps [n], labels [L], values [n, L, 4]       gating.png
                   similarity.npz   steps [n], labels [N], values [n, N, N]       similarity.png

Values are over the tokens of all ranks. While the disk is full, they are kept in memory.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from scmoe.probes.gating import GatingProbe
from scmoe.probes.similarity import SimilarityProbe
from scmoe.training.files import try_to_draw, try_to_write

Probe = GatingProbe | SimilarityProbe


class Analysis(Callback):
    """Measures one quantity over training.

    every: optimizer steps between two measurements; the first one is in the first step.
    folder: where rank 0 writes; None on other ranks.
    attach: makes the probe. average: turns its result, summed over ranks, into values; metrics and draw take those.
    """

    def __init__(
        self,
        name: str,
        every: int,
        folder: Path | None,
        attach: Callable[[Any], Probe],
        average: Callable[[Tensor], Tensor],
        metrics: Callable[[Any], dict[str, float]],
        draw: Callable[[Any, Any, Any, Path], None],
    ) -> None:
        self.every = every
        self.table, self.picture = (folder and folder / (name + suffix) for suffix in (".npz", ".png"))
        self.attach, self.average, self.metrics, self.draw = attach, average, metrics, draw
        self.probe: Probe | None = None
        self.labels: list[str] = []
        self.records: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a resumed run measured before the step that it continues from."""
        if self.table is not None and self.table.exists():
            with np.load(self.table, allow_pickle=False) as stored:
                self.labels = stored["labels"].tolist()
                before = zip(stored["steps"].tolist(), stored["values"], strict=True)
                self.records = {step: values for step, values in before if step < trainer.global_step}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0 and batch_idx % trainer.accumulate_grad_batches == 0:
            self.step, self.probe = trainer.global_step, self.attach(pl_module.model)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.probe is None:
            return
        probe, self.probe = self.probe, None
        probe.remove()
        context: Any = pl_module.parallel_context
        total = context.sum_over_ranks(probe.result())
        values = self.average(total).cpu().numpy()
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics(values), self.step)
        self.labels, self.records[self.step] = probe.labels(), values
        if self.table is not None:
            steps, labels, values = self._all()
            try_to_write(self.table, lambda path: np.savez(path, steps=steps, labels=labels, values=values))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.picture is not None and self.records:
            try_to_draw(self.picture, partial(self.draw, *self._all()))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.probe is not None:
            self.probe.remove()
            self.probe = None

    def _all(self) -> tuple[list[int], list[str], np.ndarray]:
        """Return steps, labels and values of all measurements."""
        return list(self.records), self.labels, np.stack(list(self.records.values()))
