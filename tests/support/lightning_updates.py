"""This module uses Lightning's features of optimizers, gradients, weights and precision. Each
function uses one, on one rank of two, and returns what came of it.

tests/lightning/test_ddp_features.py runs all of them under `ddp` and under `expert_parallel`, on
a model without experts. What they return must be equal to the last bit. Others: lightning_loops.py,
lightning_checkpoints.py.
"""

from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset

from tests.support.lightning_net import (
    DIM,
    HIDDEN,
    Net,
    Runs,
    computed,
    error_of,
    feature,
    loader,
    rows,
)

# ---------------------------------------------------------------------- optimizers


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


class WithClosure(Net):
    """Calls its closure in its own way, with a rate that rises in the first steps."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.global_step + 1) / 5)
        optimizer.step(closure=closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def backward(self, loss: Tensor) -> None:
        (loss * 0.5).backward()


class NoOptimizer(Net):
    def configure_optimizers(self) -> None:
        return None


class Groups(Net):
    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.backbone.parameters(), "lr": 0.01},
            {"params": self.head.parameters()},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.2)


class Manual(Net):
    """Accumulates two batches, clips and steps by hand; also its schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [StepLR(optimizer, 1, 0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class Several(Net):
    """Trains the backbone and the head in turn, as a GAN does. The other part is toggled off."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.backbone.parameters(), lr=0.01),
            sgd(self.head.parameters(), lr=0.1),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@feature
def adamw_foreach_and_fused(runs: Runs) -> Any:
    ways = ({"foreach": True, "maximize": True}, {"fused": True, "amsgrad": True})
    return [
        runs.fit(Net(make_optimizer=lambda p, lr, way=way: torch.optim.AdamW(p, lr, **way)))
        for way in ways
    ]


@feature
def lbfgs(runs: Runs) -> Any:
    return runs.fit(Net(make_optimizer=lambda p, lr: torch.optim.LBFGS(p, lr=0.1, max_iter=3)))


@feature
def other_optimizers(runs: Runs) -> Any:
    kinds = (torch.optim.Adagrad, torch.optim.Adafactor)
    return [runs.fit(Net(make_optimizer=kind), max_epochs=1) for kind in kinds]


@feature
def parameter_groups(runs: Runs) -> Any:
    return runs.fit(Groups())


@feature
def no_optimizer(runs: Runs) -> Any:
    return runs.fit(NoOptimizer())


@feature
def manual_optimization(runs: Runs) -> Any:
    return runs.fit(Manual())


@feature
def several_optimizers(runs: Runs) -> Any:
    return runs.fit(Several(), of_strategy={"find_unused_parameters": True})


@feature
def overridden_steps(runs: Runs) -> Any:
    return runs.fit(WithClosure())


# ---------------------------------------------------------------------- schedules


class Scheduled(Net):
    def __init__(self, interval: str, frequency: int = 1) -> None:
        super().__init__(make_optimizer=sgd)
        self.schedule = {"interval": interval, "frequency": frequency}

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.8), **self.schedule},
        }


class OnPlateau(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=1e6)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"},
        }


class ByLoss(Scheduled):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.global_step // 3)


@feature
def schedule_of_steps(runs: Runs) -> Any:
    return [runs.fit(Scheduled("step", n), accumulate_grad_batches=n) for n in (1, 2)]


@feature
def schedule_of_epochs(runs: Runs) -> Any:
    monitor = LearningRateMonitor()
    logger = CSVLogger(runs.folder)
    return [
        runs.fit(Scheduled("epoch"), callbacks=[monitor], logger=logger, log_every_n_steps=1),
        monitor.lrs,
    ]


@feature
def schedule_on_plateau(runs: Runs) -> Any:
    return runs.fit(OnPlateau(), val=loader(8), max_epochs=3)


@feature
def schedule_stepped_by_the_module(runs: Runs) -> Any:
    return runs.fit(ByLoss("step"))


# ---------------------------------------------------------------------- gradients


class Clipping(Net):
    """Clips from the second step on."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
    ) -> None:
        value = 0.01 if self.global_step else None
        self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm="norm")


class OwnClipping(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)


class Hooked(Net):
    """Scales gradients in a hook, and notes them in every hook that Lightning has."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Any] = []
        self.head.weight.register_hook(lambda grad: grad * 3)
        self.head.bias.register_post_accumulate_grad_hook(lambda p: self.noted.append(p.shape))
        self.backbone.register_full_backward_hook(
            lambda module, i, out: self.noted.append(out[0].clone())
        )

    def note(self) -> None:
        self.noted.append([None if p.grad is None else p.grad.clone() for p in self.parameters()])

    def on_before_backward(self, loss: Tensor) -> None:
        self.noted.append(loss.detach().clone())

    def on_after_backward(self) -> None:
        self.note()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.note()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note()


class Skipping(Net):
    """Returns None at some batches, on all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else {"loss": loss, "more": loss.detach()}


class NotFinite(Net):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * float("nan")


@feature
def accumulated_gradients(runs: Runs) -> Any:
    return runs.fit(data=loader(20), accumulate_grad_batches=3, gradient_clip_val=0.1)


@feature
def scheduled_accumulation(runs: Runs) -> Any:
    return runs.fit(callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})], max_epochs=3)


@feature
def clipping_by_norm(runs: Runs) -> Any:
    return runs.fit(Net(make_optimizer=sgd), gradient_clip_val=0.05)


@feature
def clipping_by_value(runs: Runs) -> Any:
    clip = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    return runs.fit(Net(make_optimizer=sgd), **clip)


@feature
def configure_gradient_clipping(runs: Runs) -> Any:
    return runs.fit(Clipping(make_optimizer=sgd))


@feature
def clipping_by_other_means(runs: Runs) -> Any:
    return runs.fit(OwnClipping(make_optimizer=sgd))


@feature
def gradient_hooks(runs: Runs) -> Any:
    module = Hooked()
    return [runs.fit(module, accumulate_grad_batches=2), module.noted]


@feature
def skipped_batches(runs: Runs) -> Any:
    return runs.fit(Skipping())


@feature
def a_loss_that_is_not_finite(runs: Runs) -> Any:
    return runs.fit(NotFinite())


@feature
def detect_anomaly(runs: Runs) -> Any:
    return [
        runs.fit(detect_anomaly=True),
        error_of(lambda: runs.fit(NotFinite(), detect_anomaly=True)),
    ]


# ---------------------------------------------------------------------- parameters and buffers


class Frozen(Net):
    """The first layer of its backbone is frozen."""

    def __init__(self) -> None:
        super().__init__(make_optimizer=sgd)
        self.backbone[0].requires_grad_(False)


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(HIDDEN, HIDDEN)
        self.twice.weight = self.backbone[2].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.backbone(x)))


class WithBuffers(Net):
    """Has running statistics, and a buffer with this rank's count of rows, in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.register_buffer("rows", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.rows += x.sum()
        return self.head(self.norm(self.backbone(x)))


class OddShapes(Net):
    """Has weights that are one number, empty, of another dtype, transposed, or a list's."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.wide = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        self.transposed = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.listed = nn.ParameterList([torch.ones(2), torch.ones(3)])

    def forward(self, x: Tensor) -> Tensor:
        further = (self.empty, self.wide, self.transposed, *self.listed)
        return super().forward(x) * self.number + sum(p.square().sum().float() for p in further)


class Configured(Net):
    """Makes its layers in configure_model; the sizes of one are not known before a batch."""

    def configure_model(self) -> None:
        if not hasattr(self, "lazy"):
            self.lazy = nn.LazyLinear(DIM)
            self.lazy(torch.zeros(1, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lazy(x))


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__(make_optimizer=sgd)
        self.table = nn.Embedding(10, HIDDEN, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x) + self.table((x[:, 0].abs() * 4).long().clamp(max=9)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@feature
def frozen_parameters(runs: Runs) -> Any:
    return runs.fit(Frozen())


@feature
def unused_parameters(runs: Runs) -> Any:
    return runs.fit(Unused(), of_strategy={"find_unused_parameters": True})


@feature
def unused_parameters_without_a_search(runs: Runs) -> Any:
    return error_of(lambda: runs.fit(Unused()))


@feature
def shared_parameters(runs: Runs) -> Any:
    return runs.fit(Tied(), gradient_clip_val=0.1)


@feature
def buffers(runs: Runs) -> Any:
    module = WithBuffers()
    return [runs.fit(module, val=loader(8)), module.rows]


@feature
def sync_batchnorm(runs: Runs) -> Any:
    return error_of(lambda: runs.fit(WithBuffers(), sync_batchnorm=True))


@feature
def odd_shapes(runs: Runs) -> Any:
    return runs.fit(OddShapes(), gradient_clip_val=0.5)


@feature
def sparse_gradients(runs: Runs) -> Any:
    return runs.fit(Sparse())


@feature
def configure_model(runs: Runs) -> Any:
    return runs.fit(Configured())


@feature
def arguments_of_ddp(runs: Runs) -> Any:
    given = ({"static_graph": True}, {"gradient_as_bucket_view": False, "bucket_cap_mb": 1})
    found = [runs.fit(of_strategy=arguments) for arguments in given]
    return [*found, runs.fit(WithBuffers(), of_strategy={"broadcast_buffers": False})]


# ---------------------------------------------------------------------- precision and compiling


@feature
def bf16_mixed(runs: Runs) -> Any:
    return runs.fit(precision="bf16-mixed", gradient_clip_val=0.1, val=loader(8))


@feature
def bf16_true(runs: Runs) -> Any:
    data = DataLoader(rows(16, dtype=torch.bfloat16), batch_size=2)
    return runs.fit(data=data, precision="bf16-true", gradient_clip_val=0.1)


@feature
def float64(runs: Runs) -> Any:
    data = DataLoader(rows(16, dtype=torch.float64), batch_size=2)
    return runs.fit(data=data, precision="64-true", gradient_clip_val=0.1)


@feature
def float16(runs: Runs) -> Any:
    return runs.fit(plugins=[MixedPrecision("16-mixed", "cpu")])


@feature
def torch_compile(runs: Runs) -> Any:
    class Silent(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def configure_model(self) -> None:
            self.head.compile(backend="eager")

    torch._dynamo.reset()
    module, trainer = Silent(), runs.trainer()
    trainer.fit(torch.compile(module, backend="eager"), loader())
    return computed(trainer, module)


# ---------------------------------------------------------------------- random numbers


class Dropping(Net):
    """Keeps what dropout has dropped, and numbers that are drawn outside of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.masks, self.drawn = nn.Dropout(0.5), list[Tensor](), list[Tensor]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.masks.append(self.dropout(torch.ones(8)))
        return super().training_step(batch, batch_idx)

    def on_train_start(self) -> None:
        self.drawn.append(torch.rand(3))


class Noisy(Dataset[Any]):
    """Draws noise where it is read: in worker processes."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> Any:
        return torch.full((DIM,), float(i)) + torch.rand(DIM), torch.ones(1)


@feature
def dropout(runs: Runs) -> Any:
    module = Dropping()
    return {"masks": module.masks, **runs.fit(module), "drawn": module.drawn}


@feature
def seeded_workers(runs: Runs) -> Any:
    seed_everything(7, workers=True)
    return runs.fit(data=DataLoader(Noisy(), 2, shuffle=True, num_workers=1), max_epochs=1)
