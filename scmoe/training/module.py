"""The LightningModule of language models: one loss, one optimizer, nothing that knows of ranks but
`parallel_context`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.aggregation import SumMetric

from scmoe.moe.balance import integer_sums, load_balance_loss, load_metrics, router_z_loss
from scmoe.parallel.expert_parallel import clip_grad_norm, expert_parameters
from scmoe.parallel.guard import Guard
from scmoe.parallel.mesh import ParallelContext
from scmoe.tokens import RouterStats

IGNORE = -100  # label of a position that has no target


class LanguageModel(LightningModule):
    """Next-token loss + load-balance loss + router z-loss, AdamW, linear warm-up and cosine decay.

    make_model: builds the network for a place in the mesh; called in `configure_model`, when ranks and groups exist.
    Losses and metrics are those of the global batch, whatever the number of ranks.
    """

    def __init__(
        self,
        make_model: Callable[[ParallelContext], nn.Module],
        *,
        max_steps: int,
        lr: float = 1e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 0,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        gradient_clip: float | None = None,
        load_balance_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.make_model, self.compile_blocks = make_model, compile_blocks
        self.max_steps, self.lr, self.min_lr_ratio, self.warmup_steps = max_steps, lr, min_lr_ratio, warmup_steps
        self.weight_decay, self.betas, self.eps, self.gradient_clip = weight_decay, betas, eps, gradient_clip
        self.load_balance_coef, self.z_loss_coef = load_balance_coef, z_loss_coef
        self.parallel_context = ParallelContext()
        self.model: Any = None
        self.guard: Guard | None = None
        self.val_nats, self.val_tokens, self.val_bytes = (SumMetric().set_dtype(torch.float64) for _ in range(3))
        self.val_load_sums: Tensor | None = None
        self.validated_step: int | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.make_model(self.parallel_context)
            if self.compile_blocks:
                for block in self.model.blocks:
                    block.compile()
            self.guard = Guard(self.model)

    # ------------------------------------------------------------------ loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        logits_BSV, stats = self.model(batch["input_ids"])
        nats, num_targets = cross_entropy_sum(logits_BSV, batch["labels"])
        load_sums_LE2, all_targets = self.global_sums(stats, num_targets)
        world_size = self.parallel_context.world_size
        loss = token_loss = nats * world_size / all_targets
        if load_sums_LE2 is not None:
            balance = load_balance_loss(stats, load_sums_LE2, world_size)
            z = router_z_loss(stats, load_sums_LE2, world_size)
            loss = token_loss + self.load_balance_coef * balance + self.z_loss_coef * z
            self.log("train/load_balance_loss", balance.detach())
            self.log("train/router_z_loss", z.detach())
        self.log("train/lr", self.lr_schedulers().get_last_lr()[0])  # type: ignore[union-attr]
        self.log("train/loss", token_loss.detach(), prog_bar=True, sync_dist=True)
        return {"loss": loss, "load_sums_LE2": load_sums_LE2}

    def global_sums(self, stats: list[RouterStats], num_targets: Tensor) -> tuple[Tensor | None, Tensor]:
        """The routers' integer sums and the number of targets over all ranks, in one all-reduce for all layers."""
        if not stats:
            return None, self.parallel_context.sum_over_ranks(num_targets)
        local_LE2 = integer_sums(stats)
        flat = self.parallel_context.sum_over_ranks(torch.cat([local_LE2.flatten(), num_targets[None]]))
        return flat[:-1].view_as(local_LE2), flat[-1]

    # ------------------------------------------------------------------ validation

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits_BSV, stats = self.model(batch["input_ids"], batch["padding_mask"])
        nats, num_targets = cross_entropy_sum(logits_BSV, batch["labels"])
        self.val_nats.update(nats)
        self.val_tokens.update(num_targets)
        self.val_bytes.update(batch["num_bytes"].sum())
        if stats:
            sums_LE2 = integer_sums(stats)
            self.val_load_sums = sums_LE2 if self.val_load_sums is None else self.val_load_sums + sums_LE2

    def on_validation_epoch_end(self) -> None:
        nats, tokens, num_bytes = (m.compute() for m in (self.val_nats, self.val_tokens, self.val_bytes))
        self.log("val/loss", nats / tokens, prog_bar=True)
        self.log("val/perplexity", (nats / tokens).exp())
        self.log("val/bits_per_byte", nats / num_bytes / math.log(2))
        for metric in (self.val_nats, self.val_tokens, self.val_bytes):
            metric.reset()
        if self.val_load_sums is not None:
            load = load_metrics(self.parallel_context.sum_over_ranks(self.val_load_sums))
            self.log_dict({f"val/{name}": value.float() for name, value in load.items()})
            self.val_load_sums = None
        self.validated_step = self.global_step

    # ------------------------------------------------------------------ optimization

    def configure_optimizers(self) -> Any:
        """AdamW; matrices decay, norms, biases and position embeddings do not."""
        decays = {
            p for m in self.modules() if not isinstance(m, nn.Embedding) for p in m.parameters(False) if p.dim() > 1
        }
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p in decays], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p not in decays], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        scheduler = LambdaLR(optimizer, self.lr_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_ratio(self, step: int) -> float:
        """Linear from 0 to 1 in warmup_steps, then a half cosine to min_lr_ratio at max_steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        shards = {p for _, p in expert_parameters(self)}
        assert self.guard is not None
        context, zero = self.parallel_context, self.guard.loss_as_zero()
        norm = clip_grad_norm(self.parameters(), shards, self.gradient_clip, context, zero)
        self.guard.check(norm, context)
        self.log("train/grad_norm", norm)


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of all targets together, in float32 or wider, and how many targets there are."""
    logits_NV = logits_BSV.flatten(0, 1)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    nats = F.cross_entropy(logits_NV, labels_BS.flatten(), ignore_index=IGNORE, reduction="sum")
    return nats, (labels_BS != IGNORE).sum()
