"""Part training: the quickstart's model trains in bf16 on one device with our Strategy, and its loss falls.

The text is the project's own pages in docs/, which every checkout has.
"""

import tempfile
import time
from dataclasses import replace
from statistics import mean
from typing import Any, Literal

from scmoe.experiments.bench.gpu.gpu_models import QUICKSTART, tiny
from scmoe.experiments.bench.gpu.gpu_parts import Pieces, Place
from scmoe.experiments.engine.bare import train_bare

LEAST_FALL = 0.5  # nats per token, from the first tenth of the steps to the last


def pieces(place: Place) -> Pieces:
    return {"training": lambda: train(place)}


def train(place: Place) -> dict[str, Any]:
    """Returns the loss in tenths of the training, and tokens/s. RuntimeError: it has not fallen by LEAST_FALL."""
    config = tiny(QUICKSTART) if place.tiny else QUICKSTART
    accelerator: Literal["gpu", "cpu"] = "gpu" if place.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        data, trainer = replace(config.data, cache_dir=folder), replace(config.trainer, accelerator=accelerator)
        start = time.perf_counter()
        losses = train_bare(replace(config, data=data, trainer=trainer))
        seconds = time.perf_counter() - start
    tenth = max(1, len(losses) // 10)
    tenths = [mean(losses[i : i + tenth]) for i in range(0, len(losses), tenth)]
    if not tenths[-1] < tenths[0] - LEAST_FALL:
        raise RuntimeError(f"the loss has not fallen by {LEAST_FALL} nats per token: {tenths}")
    return {
        "data": "the pages in docs/",
        "precision": config.trainer.precision,
        "steps": len(losses),
        "loss_first_tenth": tenths[0],
        "loss_last_tenth": tenths[-1],
        "loss": tenths,
        "tokens": len(losses) * config.data.global_batch_size * config.data.seq_len,
        "seconds_with_data_and_start": seconds,
    }
