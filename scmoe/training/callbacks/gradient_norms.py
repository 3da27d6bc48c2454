"""Logs the norms of the gradients by kind of module."""

from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from scmoe.models.model_cost import parts
from scmoe.parallel.mesh import expert_parameters
from scmoe.parallel.update.guard import squares
from scmoe.training.callbacks.logged_steps import logs_now


class GradientNorms(Callback):
    """Logs grad_norm/<kind> of logged steps, before clipping, for the parameters of all ranks.

    Their squares add up to that of train/grad_norm. The kinds are those of the table of parameters
    that a run prints.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, list[nn.Parameter]] = {}
        self.shards: set[nn.Parameter] = set()
        self.wanted = False

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        kinds = defaultdict[str, list[nn.Parameter]](list)
        for kind, _, members in parts(module.model):
            parameters = [p for p in module.model.parameters() if p in members]
            kinds[kind.lower().replace(" ", "_")] += parameters
        self.kinds = dict(kinds)
        self.shards = {p for _, p in expert_parameters(module)}

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.wanted = logs_now(trainer, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if not self.wanted:
            return
        mesh = module.wire.mesh
        pairs = [
            squares(parameters, self.shards, mesh, module.device)
            for parameters in self.kinds.values()
        ]
        parts_K, replicated_K = (torch.stack(sums) for sums in zip(*pairs, strict=True))
        norms_K = (mesh.sum_over_ranks(parts_K) + replicated_K).sqrt()
        module.log_dict(
            {f"grad_norm/{kind}": norm for kind, norm in zip(self.kinds, norms_K, strict=True)}
        )
