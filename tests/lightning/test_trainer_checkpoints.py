"""What a Trainer's checkpoint cannot hold is refused by name."""

import enum
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import AsyncCheckpointIO

from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.lightning.trainer_checkpoints import check_can_be_saved, refuse_checkpoint_io


class Colour(enum.Enum):
    RED = 1


class Stateful(Callback):
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}


class Unready(Callback):
    def state_dict(self):
        raise AttributeError("best is not known before the first validation")


def trainer_of(hparams, *callbacks):
    module = LightningModule()
    module.save_hyperparameters(hparams)
    return SimpleNamespace(lightning_module=module, datamodule=None, callbacks=[*callbacks])


def test_hyper_parameters_and_callbacks_that_cannot_be_saved_are_refused_by_name():
    check_can_be_saved(trainer_of({"dim": 16}, Stateful({(1, 2): 0.5}), Unready()))
    with pytest.raises(TypeError, match=r"hyper-parameter of LightningModule .*int64"):
        check_can_be_saved(trainer_of({"dim": np.int64(16)}))
    with pytest.raises(TypeError, match=r"callback Stateful .*Colour"):
        # each of one class is looked at
        check_can_be_saved(trainer_of({}, Stateful(Colour.RED), Stateful(1)))


def test_a_plugin_that_would_save_nothing_is_refused():
    refuse_checkpoint_io(ExpertParallelStrategy())
    with pytest.raises(ValueError, match="AsyncCheckpointIO is not supported"):
        refuse_checkpoint_io(ExpertParallelStrategy(checkpoint_io=AsyncCheckpointIO()))
