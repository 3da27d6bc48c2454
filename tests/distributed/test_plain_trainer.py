"""A plain one-process Trainer, without the strategy and with a LocalDispatcher, trains to the same weights."""

import pytest
import torch
from lightning.pytorch import Trainer

from scmoe.experiments.engine.ranks import RankError, run_ranks
from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.stream import MoEStream
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import build_trainer
from scmoe.training.callbacks.measurements import DataPosition
from scmoe.training.modules import LanguageModel
from tests.support.trainings import tiny

pytestmark = pytest.mark.dist

CONFIG = "position=pos2 top_k=2 optim.lr=0.01 trainer.max_steps=3"


def weights(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def with_strategy(rank, world_size):
    config = tiny(CONFIG, world_size)
    module = build_module(config)
    trainer = build_trainer(config, [DataPosition()], [])
    trainer.fit(module, build_datamodule(config))
    return weights(module), trainer.callback_metrics["train/grad_norm"]


class Poisoned(LanguageModel):
    def task_loss(self, batch):
        nats, num_targets, stats = super().task_loss(batch)
        return nats * float("nan"), num_targets, stats


def without_strategy(rank, world_size, poisoned=False):
    config = tiny(CONFIG, world_size)
    module = build_module(config)
    if poisoned:
        module.__class__ = Poisoned
    trainer = Trainer(
        strategy="auto",
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_steps=3,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DataPosition()],
    )
    trainer.fit(module, build_datamodule(config))
    streams = [m for m in module.modules() if isinstance(m, MoEStream)]
    assert streams and all(isinstance(stream.dispatcher, LocalDispatcher) for stream in streams)
    return weights(module), trainer.callback_metrics["train/grad_norm"]


def test_a_plain_trainer_is_bit_identical_to_one_with_the_strategy():
    ((plain, norm),), ((strategy, expected),) = run_ranks(without_strategy, 1), run_ranks(with_strategy, 1)
    assert norm > 0 and torch.equal(norm, expected)
    assert plain.keys() == strategy.keys()
    assert all(torch.equal(plain[name], strategy[name]) for name in plain)


def test_a_plain_trainer_stops_at_a_nan():
    with pytest.raises(RankError, match=r"FloatingPointError: gradient norm is nan, .* first not finite: rank 0: loss"):
        run_ranks(without_strategy, 1, True)
