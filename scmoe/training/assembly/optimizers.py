"""Builds the optimizer of a configuration.

An optimizer is a function (config, parameters that are trained) -> optimizer, registered by its name. Clipping and the
schedule of the learning rate are the LightningModule's.
"""

from typing import Any

from torch.optim import Optimizer

from scmoe.config.fields import Config
from scmoe.config.registry import OPTIMIZERS
from scmoe.training import muon as optimizers
from scmoe.training.muon import Trained

register_optimizer = OPTIMIZERS.register


@register_optimizer("adamw")
def adamw(config: Config, parameters: Trained) -> Optimizer:
    return optimizers.adamw(parameters, **of_adamw(config))


@register_optimizer("muon")
def muon(config: Config, parameters: Trained) -> Optimizer:
    return optimizers.MuonAndAdamW(parameters, **of_adamw(config), momentum=config.optim.momentum)


def of_adamw(config: Config) -> dict[str, Any]:
    optim = config.optim
    return {"lr": optim.lr, "weight_decay": optim.weight_decay, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
