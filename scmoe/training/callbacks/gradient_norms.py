"""Logs the norm of the gradient of each kind of part: experts, gates, attention, and so on."""

from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from scmoe.analysis.parts import parts
from scmoe.parallel.mesh import expert_parameters
from scmoe.parallel.update.clipping import total_norm
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
            sharded_K = context.sum_over_ranks(self.squares(pl_module, sharded=True)) / context.edp_size
            norms_K = (sharded_K + self.squares(pl_module, sharded=False)).sqrt()
            pl_module.log_dict({f"grad_norm/{kind}": norm for kind, norm in zip(self.kinds, norms_K, strict=True)})

    def squares(self, pl_module: LightningModule, sharded: bool) -> Tensor:
        """Return for each kind the squared norm of what this rank holds: of shards only, or of all else."""
        gradients = [[p.grad for p in own if (p in self.shards) == sharded] for own in self.kinds.values()]
        norms = [total_norm([g for g in of_kind if g is not None], pl_module.device) for of_kind in gradients]
        return torch.stack(norms).square()
