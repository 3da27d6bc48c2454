"""Without the strategy: the same configuration in a plain one-process Trainer, with a LocalDispatcher, trains the
same."""

import pytest
import torch
from lightning.pytorch import Trainer

from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.stream import MoEStream
from scmoe.testbed.ranks import run_ranks
from scmoe.training.build.data import build_datamodule
from scmoe.training.build.model import build_module
from scmoe.training.build.trainer import build_trainer
from scmoe.training.callbacks.data_position import DataPosition
from tests.support.trainings import tiny

pytestmark = pytest.mark.dist

CONFIG = "position=pos2 top_k=2 optim.lr=0.01 trainer.max_steps=3"


def weights(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def with_strategy(rank, world_size):
    config = tiny(CONFIG, world_size)
    module = build_module(config)
    build_trainer(config, [DataPosition()], []).fit(module, build_datamodule(config))
    return weights(module)


def without_strategy(rank, world_size):
    config = tiny(CONFIG, world_size)
    module = build_module(config)
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
    return weights(module)


def test_a_plain_trainer_trains_the_same_to_the_bit():
    (plain,), (strategy,) = run_ranks(without_strategy, 1), run_ranks(with_strategy, 1)
    assert plain.keys() == strategy.keys()
    assert all(torch.equal(plain[name], strategy[name]) for name in plain)
