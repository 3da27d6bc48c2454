"""The LightningModules: losses over routers and ranks with one optimizer.

Only `wire` knows about ranks. `LanguageModel` and `ImageClassifier` add what a batch is
and how predictions are measured.
"""

import math
from collections import deque
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from torchmetrics.aggregation import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from scmoe.blocks.sublayers import compile_sublayers
from scmoe.datamodules.positioned import IGNORE
from scmoe.lightning.guarded_update import guard_updates
from scmoe.lightning.seam.loops import count_steps_from
from scmoe.moe.balance import integer_sums, load_balance_loss, load_metrics, router_z_loss
from scmoe.moe.stream import move_biases
from scmoe.moe.tokens import RouterStats
from scmoe.parallel.checkpoint.loading import load_checkpoint
from scmoe.parallel.checkpoint.remote import has_manifest, located
from scmoe.parallel.mesh import expert_parameters
from scmoe.parallel.torch_seam import allow_graphs
from scmoe.parallel.wire.wire import Wire
from scmoe.training.learning_rate import LearningRate
from scmoe.training.muon import Trained, adamw

# A compiled sub-layer has graphs with gradients and without. Where batches in turns differ, it
# has them for the first size, for any other one, for one sequence and for none, and one more where
# these come in another order.
GRAPHS = 2 * 5


class MoEModule(LightningModule):
    """Minimises task loss + load-balance loss + router z-loss, at the rates of a schedule.

    Losses and metrics are those of the global batch and do not depend on the number of ranks. A
    subclass defines `task_loss` and `validation_step`, and logs its metrics in
    `on_validation_epoch_end`.

    make_model: builds the network for a rank of the mesh; called in `configure_model`, when ranks
    and groups exist. make_optimizer: gets the parameters that are trained. lr_schedule,
    decay_steps: those of learning_rate.py.
    """

    def __init__(
        self,
        make_model: Callable[[Wire], nn.Module],
        *,
        max_steps: int,
        make_optimizer: Callable[[Trained], Optimizer] = adamw,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 0,
        lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine",
        decay_steps: int | None = None,
        gradient_clip: float | None = None,
        load_balance_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        refuse_overflow: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.make_model = make_model
        self.make_optimizer = make_optimizer
        self.learning_rate = LearningRate(
            lr_schedule, max_steps, warmup_steps, min_lr_ratio, decay_steps
        )
        self.gradient_clip = gradient_clip
        self.load_balance_coef = load_balance_coef
        self.z_loss_coef = z_loss_coef
        self.refuse_overflow = refuse_overflow
        self.compiled = compiled

        self.wire = Wire()
        self.model: Any = None
        self.accumulated = 1  # batches of a step
        self.recent: dict[str, deque[Tensor]] = {}  # values of the last batches of a step
        # The routers' integer sums over the batches of a step, so far.
        self.step_sums_LE2: Tensor | None = None

        self.val_nats = exact_sum()
        self.val_targets = exact_sum()
        self.val_load_sums: Tensor | None = None
        self.validated_step: int | None = None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as Lightning does, also from a folder of ExpertParallelStrategy. `make_model` and
        `max_steps` must be passed again, as a checkpoint holds no functions."""
        if "make_model" not in kwargs:
            raise TypeError(
                f"{cls.__name__}.load_from_checkpoint lacks make_model. Pass"
                " make_model=partial(scmoe.build_model, config) and max_steps=...; scmoe.load(RUN)"
                " loads a run's model."
            )
        if not has_manifest(located(checkpoint_path)):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        with TemporaryFile() as file:  # Lightning reads a checkpoint that is one file
            torch.save(load_checkpoint(checkpoint_path), file)
            file.seek(0)
            return super().load_from_checkpoint(file, *args, **kwargs)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.make_model(self.wire)
            if self.compiled:
                allow_graphs(GRAPHS * compile_sublayers(self.model))

    def task_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[RouterStats]]:
        """Return the summed loss of this rank's targets in nats, their number, and the routers'
        sums."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Set the learning rate of this run's own schedule: a resumed run may have another number
        of steps than the saved schedule."""
        scheduler: Any = self.lr_schedulers()
        for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base * self.learning_rate.ratio(scheduler.last_epoch)

    def on_train_batch_start(self, *_: Any) -> None:
        """Count logged steps from 0. In a run that was resumed after a stop between batches,
        Lightning's count is one too high."""
        count_steps_from(self.trainer, self.trainer.global_step)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        nats, num_targets, stats = self.task_loss(batch)
        load_sums_LE2, all_targets = self.global_sums(stats, num_targets)
        world_size = self.wire.mesh.world_size
        loss = task_loss = nats * world_size / all_targets
        losses = {"train/loss": task_loss.detach()}
        if load_sums_LE2 is not None:
            balance = load_balance_loss(stats, load_sums_LE2, world_size)
            z = router_z_loss(stats, load_sums_LE2, world_size)
            loss = task_loss + self.load_balance_coef * balance + self.z_loss_coef * z
            losses["train/load_balance_loss"] = balance.detach()
            losses["train/router_z_loss"] = z.detach()
            self.add_step_sums(load_sums_LE2)
        self.log_losses(losses)
        return {"loss": loss, "step_sums_LE2": self.step_sums_LE2}

    def add_step_sums(self, load_sums_LE2: Tensor) -> None:
        """Add the routers' integer sums of a batch to those of its step."""
        earlier_LE2 = self.step_sums_LE2
        self.step_sums_LE2 = load_sums_LE2 if earlier_LE2 is None else load_sums_LE2 + earlier_LE2

    def log_losses(self, losses: dict[str, Tensor]) -> None:
        """Log the learning rate, and the mean of each loss over all ranks."""
        lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        # As a tensor of the host: Lightning copies a float to the device.
        self.log("train/lr", torch.tensor(lr, dtype=torch.float64, device="cpu"))
        sums = self.wire.mesh.sum_over_ranks(torch.stack([*losses.values()]))
        means = sums / self.wire.mesh.world_size
        for name, mean in zip(losses, means, strict=True):
            self.log_of_step(name, mean)

    def log_of_step(self, name: str, value: Tensor) -> None:
        """Log the mean over the batches of a step, of which Lightning would keep the last value."""
        recent = self.recent.setdefault(name, deque(maxlen=self.accumulated))
        recent.append(value)
        self.log(name, value if len(recent) == 1 else torch.stack([*recent]).mean())

    def global_sums(
        self, stats: list[RouterStats], num_targets: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Sum the routers' integers and the number of targets over all ranks, in one all-reduce for
        all layers."""
        if not stats:
            return None, self.wire.mesh.sum_over_ranks(num_targets)
        local_LE2 = integer_sums(stats)
        flat = self.wire.mesh.sum_over_ranks(torch.cat([local_LE2.flatten(), num_targets[None]]))
        return flat[:-1].view_as(local_LE2), flat[-1]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, then move the selection biases by the step's load. If the guard refuses the
        update, neither happens."""
        super().optimizer_step(*args, **kwargs)
        if self.step_sums_LE2 is not None:
            move_biases(self.model, self.step_sums_LE2)
        self.step_sums_LE2 = None

    def on_validation_epoch_start(self) -> None:
        """Begin all sums at 0, as a validation that was cut off leaves its own. Make them float64
        again: bf16-true moves the module to bfloat16, with its sums."""
        self.val_load_sums = None
        for name, metric in self.named_children():
            if isinstance(metric, SumMetric):
                metric.set_dtype(torch.float64)
            if isinstance(metric, Metric) and name.startswith("val_"):
                metric.reset()

    def note_validation(self, nats: Tensor, num_targets: Tensor, stats: list[RouterStats]) -> None:
        """Add one validation step to val/loss and to the experts' load."""
        self.val_nats.update(nats)
        self.val_targets.update(num_targets)
        if stats:
            sums_LE2 = integer_sums(stats)
            self.val_load_sums = (
                sums_LE2 if self.val_load_sums is None else self.val_load_sums + sums_LE2
            )

    def finish_validation(self) -> tuple[Tensor, Tensor]:
        """Log val/loss and the load over all ranks, reset both, and return nats and number of
        targets."""
        nats = self.val_nats.compute()
        targets = self.val_targets.compute()
        self.log("val/loss", nats / targets, prog_bar=True)
        self.val_nats.reset()
        self.val_targets.reset()
        if self.val_load_sums is not None:
            load = load_metrics(self.wire.mesh.sum_over_ranks(self.val_load_sums))
            self.log_dict({f"val/{name}": value.float() for name, value in load.items()})
            self.val_load_sums = None
        self.validated_step = self.global_step
        return nats, targets

    def trained(self) -> Trained:
        """Return the parameters that are trained, in three groups.

        Weight decay applies to matrices, except for embeddings that are not also the head, and for
        those that the network's `no_weight_decay` names.
        """
        others = [m for m in self.modules() if not isinstance(m, nn.Embedding)]
        decays = {p for m in others for p in m.parameters(False) if p.dim() > 1}
        without_decay: set[str] = getattr(self.model, "no_weight_decay", set)()
        decays -= {self.model.get_parameter(name) for name in without_decay}
        parameters = [p for p in self.parameters() if p.requires_grad]
        experts = {p for _, p in expert_parameters(self)}
        head = set(self.model.head.parameters())
        matrices = {p for p in decays - head if p.dim() == 2 or p in experts}
        return Trained(
            [p for p in parameters if p in matrices],
            [p for p in parameters if p in decays - matrices],
            [p for p in parameters if p not in decays],
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.trained())
        scheduler = LambdaLR(optimizer, self.learning_rate.ratio)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Let a plain Trainer clip and check as ExpertParallelStrategy does, which has set this
        already."""
        guard_updates(self.trainer.precision_plugin, self, self.wire.mesh)
        self.accumulated = self.trainer.accumulate_grad_batches
        self.recent = {}
        # A stop between a step's batches may have left some; the step begins again.
        self.step_sums_LE2 = None

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the module's limit, or by the Trainer's, which Lightning gives here."""
        limit = gradient_clip_val if self.gradient_clip is None else self.gradient_clip
        if gradient_clip_val not in (None, limit):
            raise ValueError(
                f"gradient_clip is {limit}, but gradient_clip_val of the Trainer is"
                f" {gradient_clip_val}. Set only one of them"
            )
        plugin: Any = self.trainer.precision_plugin  # with the functions of a GuardedUpdate
        norm: Tensor = plugin.clip_gradients(
            optimizer, limit or 0.0, gradient_clip_algorithm or "norm"
        )
        self.log("train/grad_norm", norm)
        if self.refuse_overflow and self.step_sums_LE2 is not None:
            check_overflow(self.step_sums_LE2)


def check_overflow(step_sums_LE2: Tensor) -> None:
    """Raise MemoryError, on every rank and before the update, if a copy of this step did not fit
    into a buffer."""
    if dropped := int(step_sums_LE2[:, -1].sum()):
        raise MemoryError(
            f"{dropped} routed copies of this step did not fit into a rank's buffer, so no update"
            " was made. Raise moe.dropless_ceiling or moe.load_balance_coef, or set"
            " moe.overflow=drop."
        )


def cross_entropy_sum(logits_NC: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over all targets in nats, in float32 or wider.

    labels: classes [N] or probabilities [N, C].
    """
    logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
    return F.cross_entropy(logits_NC, labels, ignore_index=IGNORE, reduction="sum")


def exact_sum() -> SumMetric:
    """Return a metric that adds up float64 over batches and ranks. It keeps a NaN, which
    torchmetrics would leave out."""
    metric = SumMetric(nan_strategy="disable")
    metric.set_dtype(torch.float64)
    return metric


class LanguageModel(MoEModule):
    """Predicts the next token. Validation logs val/loss, val/perplexity and val/bits_per_byte."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.val_bytes = exact_sum()

    def task_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[RouterStats]]:
        logits_BSV, stats = self.model(batch["input_ids"], batch.get("padding_mask"))
        nats = cross_entropy_sum(logits_BSV.flatten(0, 1), batch["labels"].flatten())
        return nats, (batch["labels"] != IGNORE).sum(), stats

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.note_validation(*self.task_loss(batch))
        self.val_bytes.update(batch["num_bytes"].sum())

    def on_validation_epoch_end(self) -> None:
        nats, tokens = self.finish_validation()
        self.log("val/perplexity", (nats / tokens).exp())
        self.log("val/bits_per_byte", nats / self.val_bytes.compute() / math.log(2))
        self.val_bytes.reset()


class ImageClassifier(MoEModule):
    """Classifies images [B, 3, S, S]. Validation logs val/loss and val/accuracy, over all ranks.

    Labels are probabilities [B, C] in training and classes [B] in validation.
    """

    def __init__(self, *args: Any, num_classes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORE)

    def task_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[RouterStats]]:
        labels_BC = batch["labels"]
        if labels_BC.dtype.itemsize < 4:  # bf16-true has rounded them: they must add up to 1 again
            labels_BC = labels_BC.float() / labels_BC.float().sum(1, keepdim=True)
        logits_BC, stats = self.model(batch["images"])
        num_targets = torch.full((), len(labels_BC), device=labels_BC.device)
        return cross_entropy_sum(logits_BC, labels_BC), num_targets, stats

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        labels_B = batch["labels"]
        mask_B = labels_B != IGNORE  # filler gives all ranks the same number of batches
        logits_BC, stats = self.model(batch["images"], mask_B)
        self.note_validation(cross_entropy_sum(logits_BC, labels_B), mask_B.sum(), stats)
        self.val_accuracy.update(logits_BC, labels_B)

    def on_validation_epoch_end(self) -> None:
        self.finish_validation()
        self.log("val/accuracy", self.val_accuracy.compute(), prog_bar=True)
        self.val_accuracy.reset()
