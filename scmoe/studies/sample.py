"""Text from a run's model."""

from __future__ import annotations

from pathlib import Path

import torch

from datamodules.text import TextDataModule
from scmoe.config.fields import ConfigError
from scmoe.config.load import load
from scmoe.models.decoder import generate
from scmoe.parallel.checkpoint.durable import newest_good
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.build.data import build_datamodule
from scmoe.training.build.model import build_model


def sample(
    run_dir: Path, prompt: str, number: int, tokens: int, temperature: float, top_k: int, seed: int
) -> list[str]:
    """Return `number` texts that continue the prompt by so many tokens, written by the run's newest checkpoint.

    Raises ConfigError for a run on other data than text, FileNotFoundError for one without a whole checkpoint.
    """
    path = run_dir.resolve()
    config = load(path / "config.yaml")
    data = build_datamodule(config)
    if not isinstance(data, TextDataModule):
        raise ConfigError(f"{run_dir} was trained on {config.data.name} data, allowed: a run on text")
    data.prepare_data()
    data.setup()
    model = build_model(config, ParallelContext()).eval()
    load_model(newest_good(path / "checkpoints"), model, prefix="model.")
    start = [data.end_of_text, *data.encode(prompt).tolist()]
    with torch.inference_mode():
        written = generate(
            model, torch.tensor([start] * number), tokens, temperature=temperature, top_k=top_k, seed=seed
        )
    return [data.decode(row[1:].tolist()) for row in written]
