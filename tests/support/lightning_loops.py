"""This module uses Lightning's features of data, loops, logging, hooks and callbacks, as
lightning_updates.py does those of optimizers and weights."""

import copy
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tests.support.lightning_net import Net, Runs, clones, computed, error_of, feature, loader, rows

# ---------------------------------------------------------------------- data


class Split(IterableDataset[Any]):
    """Gives every rank so many rows of its own."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        return iter(rows(self.numbers[rank], seed=rank))


class Module(LightningDataModule):
    """Notes what Lightning calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def prepare_data(self) -> None:
        self.called.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.called.append(f"setup {stage}")

    def train_dataloader(self) -> Any:
        self.called.append("train_dataloader")
        return loader()

    def val_dataloader(self) -> Any:
        self.called.append("val_dataloader")
        return [loader(8), loader(12)]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.called.append(f"before transfer {dataloader_idx}")
        return batch

    def teardown(self, stage: str) -> None:
        self.called.append(f"teardown {stage}")


class Many(Net):
    """Takes batches of several loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = [
            part
            for part in (batch.values() if isinstance(batch, dict) else batch)
            if part is not None
        ]
        return super().training_step(
            [torch.cat(tensors) for tensors in zip(*parts, strict=True)], batch_idx
        )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch), sync_dist=True)
        self.log(f"of_{dataloader_idx}", self.loss(batch), sync_dist=True, add_dataloader_idx=False)


@feature
def samplers(runs: Runs) -> Any:
    seen = []
    torch.manual_seed(3)
    for sampler in (
        SubsetRandomSampler(range(12), torch.Generator().manual_seed(5)),
        WeightedRandomSampler([1.0, 2.0] * 8, 16, generator=torch.Generator().manual_seed(6)),
        SequentialSampler(range(16)),
    ):
        seen.append(runs.fit(data=loader(sampler=sampler), max_epochs=1))
    batches = BatchSampler(SequentialSampler(range(16)), 3, drop_last=True)
    seen.append(
        runs.trainer(max_epochs=1).predict(Net(), DataLoader(rows(16), batch_sampler=batches))
    )
    return [
        *seen,
        runs.fit(data=loader(shuffle=True)),
        runs.fit(data=loader(13, drop_last=True, shuffle=True)),
    ]


@feature
def use_distributed_sampler(runs: Runs) -> Any:
    sampler = RandomSampler(range(16), generator=torch.Generator().manual_seed(runs.rank))
    return runs.fit(data=loader(sampler=sampler), use_distributed_sampler=False)


@feature
def shuffled_without_a_distributed_sampler(runs: Runs) -> Any:
    return runs.fit(data=loader(shuffle=True), use_distributed_sampler=False)


@feature
def uneven_data(runs: Runs) -> Any:
    return runs.fit(data=loader(13), val=loader(7))


@feature
def iterable_data(runs: Runs) -> Any:
    data = DataLoader(Split(8, 8), batch_size=2)
    return [
        runs.fit(data=data),
        runs.fit(data=data, val=data, max_epochs=-1, max_steps=5, val_check_interval=2),
    ]


@feature
def uneven_batches(runs: Runs) -> Any:
    """Under ddp the rank with more batches waits forever, so nothing is trained there."""
    if runs.make_strategy is DDPStrategy:
        return {}
    return runs.fit(data=loader(8 + 4 * runs.rank), use_distributed_sampler=False)


@feature
def uneven_prediction(runs: Runs) -> Any:
    """Ranks without experts wait for each other in no step, so they may have different numbers of
    batches."""
    return [runs.trainer().predict(Net(), loader(n)) for n in (9, 3)]


@feature
def combined_loaders(runs: Runs) -> Any:
    parts = {"a": loader(16), "b": loader(8)}
    modes = [CombinedLoader(parts, mode) for mode in ("max_size_cycle", "min_size", "max_size")]
    return [runs.fit(Many(), mode) for mode in modes] + [runs.fit(Many(), [loader(8), loader(16)])]


@feature
def several_validation_loaders(runs: Runs) -> Any:
    return [
        runs.fit(Many(), [loader()], [loader(8), loader(12)]),
        runs.fit(
            Many(),
            [loader()],
            CombinedLoader([loader(8), loader(12)], "sequential"),
            num_sanity_val_steps=-1,
        ),
    ]


@feature
def data_module(runs: Runs) -> Any:
    data, module = Module(), Many()
    module.training_step = lambda batch, batch_idx: Net.training_step(module, batch, batch_idx)  # type: ignore
    trainer = runs.trainer()
    trainer.fit(module, datamodule=data)
    return [computed(trainer, module), data.called]


@feature
def reloaded_loaders(runs: Runs) -> Any:
    class Reloading(Net):
        def train_dataloader(self) -> Any:
            calls.append(self.current_epoch)
            return loader(8 + 4 * len(calls))

    calls: list[int] = []
    module, trainer = Reloading(), runs.trainer(reload_dataloaders_every_n_epochs=1, max_epochs=3)
    trainer.fit(module)
    return [computed(trainer, module), calls]


@feature
def limited_batches(runs: Runs) -> Any:
    limits = {
        "limit_train_batches": 3,
        "limit_val_batches": 0.5,
        "limit_test_batches": 1,
        "limit_predict_batches": 1,
    }
    module, trainer = Net(), runs.trainer(**limits)
    trainer.fit(module, loader(), loader(16))
    end = computed(trainer, module)
    tested = trainer.test(module, loader(), verbose=False)
    return [end, tested, trainer.predict(module, loader()), trainer.num_val_batches]


@feature
def overfit_batches(runs: Runs) -> Any:
    return [
        runs.fit(overfit_batches=n, data=loader(16), val=loader(16), max_epochs=3) for n in (1, 0.5)
    ]


# -------------------------------------------------- when to validate and when to stop


class StopsItself(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 1 and batch_idx == 2 else None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trainer.should_stop = self.global_step >= 9


@feature
def val_check_interval(runs: Runs) -> Any:
    found = []
    for how in (
        {"val_check_interval": 0.5},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 2, "accumulate_grad_batches": 3},
    ):
        calls: list[int] = []
        note = LambdaCallback(
            on_validation_end=lambda t, m, calls=calls: calls.append(t.global_step)
        )
        found.append([runs.fit(val=loader(8), callbacks=[note], **how), calls])
    return found


@feature
def num_sanity_val_steps(runs: Runs) -> Any:
    found = []
    for number in (1, -1):
        calls: list[bool] = []
        note = LambdaCallback(
            on_validation_batch_end=lambda t, *_, c=calls: c.append(t.sanity_checking)
        )
        found.append(
            [runs.fit(val=loader(8), callbacks=[note], num_sanity_val_steps=number), calls]
        )
    return found


@feature
def fast_dev_run(runs: Runs) -> Any:
    return runs.fit(val=loader(8), fast_dev_run=2)


@feature
def barebones(runs: Runs) -> Any:
    class Bare(Net):
        def log(self, *args: Any, **kwargs: Any) -> None:
            """Barebones trainers warn of each."""

    return runs.fit(Bare(), barebones=True, val=loader(8))


@feature
def early_stopping(runs: Runs) -> Any:
    found = []
    for how in ({"patience": 1, "min_delta": 10.0}, {"patience": 9, "stopping_threshold": 100.0}):
        stopper = EarlyStopping("val_loss", check_on_train_epoch_end=False, **how)
        end = runs.fit(val=loader(8), callbacks=[stopper], max_epochs=6, min_epochs=2)
        found.append([end, stopper.stopped_epoch, stopper.wait_count, stopper.best_score])
    return found


@feature
def timer(runs: Runs) -> Any:
    return [
        runs.fit(callbacks=[Timer(timedelta(0), interval=interval)])
        for interval in ("step", "epoch")
    ]


@feature
def max_time(runs: Runs) -> Any:
    return [runs.fit(max_time=timedelta(0)), runs.fit(max_time={"seconds": 0}, min_steps=3)]


@feature
def stopped_by_the_module(runs: Runs) -> Any:
    return runs.fit(StopsItself(), max_epochs=5)


@feature
def min_and_max_steps(runs: Runs) -> Any:
    return [
        runs.fit(max_steps=3),
        runs.fit(min_steps=6, max_steps=7, max_epochs=-1),
        runs.fit(max_steps=0),
    ]


@feature
def two_fits(runs: Runs) -> Any:
    module, trainer = Net(), runs.trainer()
    trainer.fit(module, loader())
    first = computed(trainer, module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    second = computed(trainer, module)
    return [first, second, runs.fit(module)]


# ---------------------------------------------------------------------- validate, test, predict


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.written: list[Any] = []

    def write_on_batch_end(
        self, trainer: Any, module: Any, prediction: Any, indices: Any, *_: Any
    ) -> None:
        self.written.append([prediction, indices])

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
        self.written.append([predictions, indices])


@feature
def validate_before_fit(runs: Runs) -> Any:
    module, trainer = Net(), runs.trainer()
    before = trainer.validate(module, loader(8), verbose=False)
    trainer.fit(module, loader(), loader(8))
    return [before, computed(trainer, module), trainer.validate(module, loader(8), verbose=False)]


@feature
def test_loop(runs: Runs) -> Any:
    module, trainer = Net(), runs.trainer()
    before = trainer.test(module, loader(7), verbose=False)
    trainer.fit(module, loader())
    after = trainer.test(module, [loader(8)], verbose=False)
    return [before, after, runs.trainer().test(module, loader(8), verbose=False)]


@feature
def predict(runs: Runs) -> Any:
    writer, module = Writer(), Net()
    predictions = runs.trainer(callbacks=[writer]).predict(module, loader(9))
    return [predictions, writer.written, runs.trainer().predict(module, [loader(4), loader(6)])]


@feature
def inference_mode(runs: Runs) -> Any:
    class Asking(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            modes.append(
                [torch.is_inference_mode_enabled(), torch.is_grad_enabled(), self.training]
            )

    modes: list[Any] = []
    for asked in (True, False):
        runs.trainer(inference_mode=asked).validate(Asking(), loader(4), verbose=False)
        runs.fit(Asking(), val=loader(4), inference_mode=asked, max_epochs=1)
    return modes


# ---------------------------------------------------------------------- logging


class Logging(Net):
    """Logs values that differ from rank to rank, in every way."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].sum().detach()
        for reduce_fx in ("mean", "sum", "max", "min"):
            how = {"reduce_fx": reduce_fx, "on_step": True, "on_epoch": True}
            self.log(f"synced_{reduce_fx}", x, sync_dist=True, **how)
            self.log(f"own_{reduce_fx}", x, **how)
        self.log_dict({"a": x, "b": float(batch_idx)}, on_epoch=True, batch_size=2, sync_dist=True)
        self.log("on_rank_zero", x, rank_zero_only=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("of_epoch", float(self.current_epoch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log(
            "of_validation", torch.tensor(1.0 + self.global_rank), sync_dist=True, reduce_fx="max"
        )


class Talking(Net):
    """Uses the strategy's own collectives."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        whole = self.all_gather(loss, sync_grads=True)
        many = self.all_gather({"x": batch[0], "n": torch.tensor(self.global_rank)})
        strategy = self.trainer.strategy
        self.said.append([clones(many), strategy.reduce(loss.detach(), reduce_op="sum")])
        self.said.append(
            [strategy.broadcast([self.global_rank, "x"], 1), strategy.reduce_boolean_decision(True)]
        )
        self.said.append([self.trainer.is_global_zero, self.trainer.world_size, self.local_rank])
        strategy.barrier("here")
        return whole.mean() + loss

    said: list[Any]


@feature
def logged_values(runs: Runs) -> Any:
    logger = CSVLogger(runs.folder / str(runs.rank))
    end = runs.fit(Logging(), val=loader(8), logger=logger, log_every_n_steps=1)
    written = logger.experiment.metrics if runs.rank == 0 else []
    return [
        end,
        written,
        (runs.folder / "0" / "lightning_logs" / "version_0" / "metrics.csv").exists(),
    ]


@feature
def collectives_of_the_strategy(runs: Runs) -> Any:
    module = Talking()
    module.said = []
    return [runs.fit(module), module.said]


# ---------------------------------------------------------------------- hooks


class Failing(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise ValueError("as wanted")
        return super().training_step(batch, batch_idx)


class Copying(Callback):
    """Keeps a copy of the best model so far, as a user's callback does."""

    def __init__(self) -> None:
        self.copies: list[Any] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.copies.append(copy.deepcopy(module))


class OwnAverage(Callback):
    """Averages the weights of a part of the module, in a copy that it makes before training."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.average = torch.optim.swa_utils.AveragedModel(module.backbone)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.average.update_parameters(module.backbone)


def noting(kind: type, calls: list[str]) -> type:
    """Return a class that notes each hook which Lightning calls."""

    def wrapped(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(f"{'module' if issubclass(kind, Net) else 'callback'} {name}")
            return getattr(kind, name)(self, *args, **kwargs)

        return hook

    started = (
        "on_",
        "configure_gradient",
        "configure_model",
        "configure_optimizers",
        "transfer_",
        "optimizer_",
    )
    hooks = [
        n
        for n in dir(kind)
        if n.startswith(started) and callable(getattr(kind, n)) and n != "on_gpu"
    ]
    return type(
        f"Noting{kind.__name__}", (kind,), {n: wrapped(n) for n in [*hooks, "setup", "teardown"]}
    )


@feature
def order_of_hooks(runs: Runs) -> Any:
    calls: list[str] = []
    module, callback = noting(Net, calls)(), noting(Callback, calls)()
    module.prepare_data_per_node = True
    trainer = runs.trainer(callbacks=[callback], gradient_clip_val=0.1, accumulate_grad_batches=2)
    trainer.fit(module, loader(8), loader(4))
    trainer.validate(module, loader(4), verbose=False)
    trainer.test(module, loader(4), verbose=False)
    trainer.predict(module, loader(4))
    return calls


@feature
def on_exception(runs: Runs) -> Any:
    seen: list[str] = []
    note = LambdaCallback(on_exception=lambda trainer, module, error: seen.append(repr(error)))
    module, trainer = Failing(), runs.trainer(callbacks=[note])
    return [error_of(lambda: trainer.fit(module, loader())), seen, computed(trainer, module)]


@feature
def deep_copies(runs: Runs) -> Any:
    module, copying = Net(), Copying()
    trainer = runs.trainer(callbacks=[copying])
    trainer.fit(module, loader())
    copies = [*copying.copies, copy.deepcopy(module)]
    copy.deepcopy(trainer.callbacks)
    return [computed(trainer, module), [clones(one.state_dict()) for one in copies]]


@feature
def an_average_of_a_part(runs: Runs) -> Any:
    average = OwnAverage()
    return [runs.fit(callbacks=[average]), clones(average.average.state_dict())]


# ---------------------------------------------------------------------- tuner and finetuning


class Thawed(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@feature
def learning_rate_finder(runs: Runs) -> Any:
    finder = LearningRateFinder(num_training_steps=12)
    module = Net()
    end = runs.fit(module, callbacks=[finder], max_epochs=3)
    return [end, finder.optimal_lr.results, module.lr]


@feature
def tuner(runs: Runs) -> Any:
    module, trainer = Net(), runs.trainer()
    found = Tuner(trainer).lr_find(module, loader(), num_training=8, early_stop_threshold=None)
    rate = module.lr
    trainer.fit(module, loader())
    return [found.results, rate, computed(trainer, module), runs.files()]


@feature
def batch_size_finder(runs: Runs) -> Any:
    return error_of(lambda: runs.fit(callbacks=[BatchSizeFinder(max_trials=1)]))


@feature
def backbone_finetuning(runs: Runs) -> Any:
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)
    return runs.fit(Thawed(), callbacks=[finetuning], max_epochs=3)


@feature
def weight_averaging(runs: Runs) -> Any:
    return runs.fit(callbacks=[WeightAveraging()])


@feature
def ema_weight_averaging(runs: Runs) -> Any:
    return runs.fit(callbacks=[EMAWeightAveraging()])


@feature
def stochastic_weight_averaging(runs: Runs) -> Any:
    return runs.fit(callbacks=[StochasticWeightAveraging(0.1, swa_epoch_start=1)], max_epochs=3)
