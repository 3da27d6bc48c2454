"""Logs the norm of the gradient of each kind of part: experts, gates, attention, and so on."""

from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from scmoe.footprint.model_cost import parts
from scmoe.parallel.mesh import expert_parameters
from scmoe.parallel.update.clipping import squares
from scmoe.training.callbacks.log_lines import logs_now


class GradientNorms(Callback):
    """Logs grad_norm/<kind> of logged steps, before clipping: norms of the whole model, whatever ranks hold.

    Their squares add up to that of train/grad_norm. Kinds are those of the table of parameters that a run prints.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, list[nn.Parameter]] = {}
        self.shards: set[nn.Parameter] = set()
        self.wanted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kinds = defaultdict[str, list[nn.Parameter]](list)
        model: Any = pl_module.model
        for kind, _, own in parts(model):
            kinds[kind.lower().replace(" ", "_")] += [p for p in model.parameters() if p in own]
        self.kinds, self.shards = dict(kinds), {p for _, p in expert_parameters(pl_module)}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.wanted = logs_now(trainer, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.wanted:
            context: Any = pl_module.parallel_context
            of_kinds = [squares(own, self.shards, context, pl_module.device) for own in self.kinds.values()]
            parts_K, replicated_K = (torch.stack(each) for each in zip(*of_kinds, strict=True))
            norms_K = (context.sum_over_ranks(parts_K) + replicated_K).sqrt()
            pl_module.log_dict({f"grad_norm/{kind}": norm for kind, norm in zip(self.kinds, norms_K, strict=True)})
