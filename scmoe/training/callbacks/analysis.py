"""Measurements of representations over training: Fig. 9, Fig. 10 and Eq. 22's gradients, kept in
<run>/analysis/.

    gating.npz        steps [n], labels [L], values [n, L, 4]        gating.png
    similarity.npz    steps [n], labels [N], values [n, N, N]        similarity.png
    gradients.npz     steps [n], labels [N], values [n, N, 1]        gradients.png

Values are over the tokens of all ranks. A probe is attached for one batch at intervals, then
removed. While the disk is full, values are kept in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer

from scmoe.files import try_to_draw, try_to_write
from scmoe.training.callbacks.logged_steps import begins_measured_step
from scmoe.training.callbacks.representation_charts import (
    draw_gating,
    draw_gradients,
    draw_similarity,
)
from scmoe.training.callbacks.representations import (
    GatingProbe,
    GradientProbe,
    SimilarityProbe,
    gating_metrics,
    gradient_metrics,
    means,
    similarity_metrics,
)

Probe = GatingProbe | SimilarityProbe | GradientProbe


@dataclass(frozen=True)
class Quantity:
    """What is measured.

    attach: makes the probe. metrics, draw: take the means of its sums over all ranks.
    """

    name: str
    attach: Callable[[Any], Probe]
    metrics: Callable[[Any], dict[str, float]]
    draw: Callable[[Any, Any, Any, Path], None]


def gating(position: str) -> Quantity:
    """Return Fig. 9's quantity. position: of the tap."""
    return Quantity("gating", partial(GatingProbe, position=position), gating_metrics, draw_gating)


SIMILARITY = Quantity("similarity", SimilarityProbe, similarity_metrics, draw_similarity)
GRADIENTS = Quantity("gradients", GradientProbe, gradient_metrics, draw_gradients)


class Analysis(Callback):
    """Measures one quantity over training.

    every: optimizer steps between two measurements; the first one is in the first step.
    folder: where rank 0 writes; None on other ranks.
    """

    def __init__(self, quantity: Quantity, every: int, folder: Path | None) -> None:
        self.quantity, self.every = quantity, every
        self.table = folder and folder / f"{quantity.name}.npz"
        self.probe: Probe | None = None
        self.labels: list[str] = []
        self.records: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Keep what a resumed run measured before the step that it continues from."""
        if self.table is not None and self.table.exists():
            with np.load(self.table, allow_pickle=False) as stored:
                self.labels = stored["labels"].tolist()
                before = zip(stored["steps"].tolist(), stored["values"], strict=True)
                self.records = {
                    step: values for step, values in before if step < trainer.global_step
                }

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if begins_measured_step(trainer, batch_idx, self.every):
            self.step = trainer.global_step
            self.probe = self.quantity.attach(module.model)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.probe is None:
            return
        probe, self.probe = self.probe, None
        probe.remove()
        total = module.wire.mesh.sum_over_ranks(probe.result())
        values = means(total).cpu().numpy()
        for logger in trainer.loggers:
            logger.log_metrics(self.quantity.metrics(values), self.step)
            logger.save()  # as Lightning does: a run that is killed has its rows

        self.labels = probe.labels()
        self.records[self.step] = values
        if self.table is not None:
            steps, labels, values = self._all()
            try_to_write(
                self.table, lambda path: np.savez(path, steps=steps, labels=labels, values=values)
            )

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self.table is not None and self.records:
            try_to_draw(self.table.with_suffix(".png"), partial(self.quantity.draw, *self._all()))

    def on_exception(self, *_: Any) -> None:
        if self.probe is not None:
            self.probe.remove()

    def _all(self) -> tuple[list[int], list[str], np.ndarray]:
        """Return steps, labels and values of all measurements."""
        return list(self.records), self.labels, np.stack(list(self.records.values()))
