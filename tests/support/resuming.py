"""This module trains on one rank as a user does, with checkpoints and resuming, and compares the
ends of two runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from scmoe.config.fields import Config
from scmoe.parallel.mesh import expert_parameters
from scmoe.training.assembly.model import build_module
from scmoe.training.modules import LanguageModel
from tests.support.trainings import fit as train
from tests.support.trainings import whole as gathered

HALF, WHOLE = 3, 6


def fit(
    config: Config, folder: Path | None = None, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train on this rank, keep a checkpoint of every third step; return what must be equal."""
    checkpoints = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=HALF, save_top_k=-1 if folder else 0
    )
    module = build_module(config)
    trainer = train(config, checkpoints, module=module, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == WHOLE
    names = {p: name for name, p in module.model.named_parameters()}
    (optimizer,) = trainer.optimizers
    tensors = {name: gathered(p) for p, name in names.items()}
    for p, state in optimizer.state.items():
        tensors |= {f"{names[p]} {key}": gathered(value) for key, value in state.items()}
    return {
        "tensors": tensors,
        "experts": {names[p] for _, p in expert_parameters(module.model)},
        "ep_size": module.wire.mesh.ep_size,
        "consumed": trainer.datamodule.consumed_samples,
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
    }


def exit_code(run: Callable[[], Any]) -> Any:
    """Run this and return its exit code; None if it does not exit."""
    try:
        run()
    except SystemExit as end:
        return end.code
    return None


@contextmanager
def before_each(step: str, note: Callable[[LanguageModel, int], Any]) -> Iterator[None]:
    """Call note(module, batch_idx) before each `training_step` or `validation_step` of a
    LanguageModel."""
    original = getattr(LanguageModel, step)

    def noted(module: LanguageModel, batch: dict[str, Tensor], batch_idx: int) -> Any:
        note(module, batch_idx)
        return original(module, batch, batch_idx)

    with patch.object(LanguageModel, step, noted):
        yield


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return parameters and AdamW's state as one process has them."""
    first = ranks[0]
    shards = [rank["tensors"] for rank in ranks[: first["ep_size"]]]
    return {
        name: (
            torch.cat([s[name] for s in shards])
            if name.split()[0] in first["experts"] and t.dim()
            else t
        )
        for name, t in first["tensors"].items()
    }


def largest_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> tuple[float, str]:
    x, y = whole(a), whole(b)
    assert x.keys() == y.keys()
    return max(((x[name] - y[name]).abs().max().item(), name) for name in x)
