"""This module uses Lightning's features of saving and loading, as lightning_updates.py does those
of optimizers and weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from tests.support.lightning_loops import Failing, Thawed
from tests.support.lightning_net import (
    Net,
    Runs,
    clones,
    computed,
    error_of,
    feature,
    in_one_file,
    loader,
    rows,
)
from tests.support.lightning_updates import Groups, OddShapes, Scheduled, Tied, WithBuffers


def saving(runs: Runs, **how: Any) -> dict[str, Any]:
    """Return a Trainer's arguments: by default it keeps a checkpoint of every second step."""
    usual = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 2}
    return {
        "callbacks": [ModelCheckpoint(runs.folder, **(usual | how))],
        "enable_checkpointing": True,
    }


def resumed(runs: Runs, make: Callable[[], Net], step: int = 6, **how: Any) -> list[Any]:
    """Return a training, and one that goes on from a checkpoint of it."""
    whole = runs.fit(make(), **saving(runs, every_n_train_steps=step), **how)
    return [whole, runs.fit(make(), ckpt_path=runs.folder / f"step={step}.ckpt", **how)]


@feature
def save_last(runs: Runs) -> Any:
    found = []
    for way in (True, "link"):
        how = saving(runs, save_last=way, save_top_k=1, filename=f"{way}-{{step}}")
        end = runs.fit(**how)
        found.append([end, runs.files(), Path(how["callbacks"][0].last_model_path).name])
        found.append(runs.fit(ckpt_path="last", **(how | {"max_epochs": 3})))
    return found


@feature
def save_top_k(runs: Runs) -> Any:
    found = []
    for mode in ("min", "max"):
        best_two = {
            "monitor": "val_loss",
            "mode": mode,
            "save_top_k": 2,
            "every_n_train_steps": None,
        }
        how = saving(runs, filename=mode + "{epoch}", **best_two)
        trainer, module, saver = runs.trainer(**how, max_epochs=4), Net(), how["callbacks"][0]
        trainer.fit(module, loader(), loader(8))
        best = trainer.validate(
            ckpt_path="best", dataloaders=loader(8), verbose=False, weights_only=False
        )
        kept = {Path(path).name: score for path, score in saver.best_k_models.items()}
        found.append(
            [computed(trainer, module), runs.files(), best, Path(saver.best_model_path).name, kept]
        )
    return found


@feature
def save_every_n(runs: Runs) -> Any:
    found = []
    for i, how in enumerate(
        ({"every_n_train_steps": 3}, {"every_n_train_steps": None, "every_n_epochs": 2})
    ):
        found.append(
            [
                runs.fit(**saving(runs, filename=f"{i}-{{epoch}}-{{step}}", **how), max_epochs=3),
                runs.files(),
            ]
        )
    return found


@feature
def resume_inside_an_epoch(runs: Runs) -> Any:
    return resumed(runs, lambda: Scheduled("step"))


@feature
def resume_of_groups(runs: Runs) -> Any:
    return resumed(runs, Groups)


@feature
def resume_of_tied_weights(runs: Runs) -> Any:
    return resumed(runs, Tied)


@feature
def resume_of_buffers(runs: Runs) -> Any:
    return resumed(runs, WithBuffers, val=loader(8))


@feature
def resume_of_odd_shapes(runs: Runs) -> Any:
    return resumed(runs, OddShapes)


@feature
def resume_with_a_fused_optimizer(runs: Runs) -> Any:
    return resumed(
        runs,
        lambda: Net(
            make_optimizer=lambda p, lr: torch.optim.AdamW(p, lr, fused=True, amsgrad=True)
        ),
    )


@feature
def resume_with_float64(runs: Runs) -> Any:
    """ddp reads the weights before it makes the module float64, and so rounds them."""
    data = DataLoader(rows(16, dtype=torch.float64), batch_size=2)
    whole = runs.fit(data=data, precision="64-true", **saving(runs, every_n_train_steps=4))
    resumed = runs.fit(data=data, precision="64-true", ckpt_path=runs.folder / "step=8.ckpt")
    exact = all(torch.equal(resumed["weights"][name], t) for name, t in whole["weights"].items())
    return {"trained": whole, "exact": exact, "resumed": resumed}


@feature
def resume_with_shuffled_data(runs: Runs) -> Any:
    return resumed(runs, Net, data=loader(shuffle=True))


@feature
def lbfgs_in_a_checkpoint(runs: Runs) -> Any:
    return resumed(
        runs, lambda: Net(make_optimizer=lambda p, lr: torch.optim.LBFGS(p, lr=0.1, max_iter=2))
    )


@feature
def finetuning_that_goes_on(runs: Runs) -> Any:
    """The backbone is a group of the optimizer from the second epoch on."""
    finetuning = {"unfreeze_backbone_at_epoch": 1, "backbone_initial_lr": 0.01}
    how = saving(runs)
    how["callbacks"].append(BackboneFinetuning(**finetuning))
    whole = runs.fit(Thawed(), **how, max_epochs=3)
    later = {"callbacks": [BackboneFinetuning(**finetuning)], "max_epochs": 4}
    return [whole, runs.fit(Thawed(), ckpt_path=runs.folder / "step=10.ckpt", **later)]


@feature
def weights_only(runs: Runs) -> Any:
    how = saving(runs, save_weights_only=True)
    end, path = runs.fit(**how), runs.folder / "step=4.ckpt"
    module = Net()
    validated = runs.trainer().validate(
        module, loader(8), ckpt_path=path, verbose=False, weights_only=True
    )
    loaded = clones(Net.load_from_checkpoint(in_one_file(path), weights_only=True).state_dict())
    refused = error_of(lambda: runs.fit(ckpt_path=path)).partition(":")[0]
    return {"all": [end, validated, clones(module.state_dict()), loaded], "refused": refused}


class WithParameters(Net):
    def __init__(self, width: int, names: tuple[str, ...] = ("a",)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.more = torch.nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.more(x.repeat(1, 2)[:, : self.hparams.width])


@feature
def hyper_parameters(runs: Runs) -> Any:
    end = runs.fit(WithParameters(5), **saving(runs))
    file = in_one_file(runs.folder / "step=4.ckpt")
    loaded = WithParameters.load_from_checkpoint(file, weights_only=True)
    return [end, clones(loaded.state_dict()), loaded.hparams.width]


class Remembering(Callback):
    """Has state of every plain type, the same on all ranks."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {
            "count": 0,
            "sum": torch.zeros(2),
            "path": None,
            "nested": {1: [1.5, "x"]},
        }
        self.loaded: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.state["count"] += 1
        self.state["sum"] += trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return clones(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = clones(state)
        self.loaded.append(clones(state))

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"tensor": torch.arange(3) + trainer.global_step, "text": "x"}

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self.loaded.append([checkpoint["mine"], checkpoint["global_step"], checkpoint["epoch"]])


class RememberingNet(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["of module"] = [1, 2.5, self.global_step]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["of module"]


class RememberingData(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.loaded = 0, list[Any]()

    def train_dataloader(self) -> Any:
        return loader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.count += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded.append(state)


@feature
def states_of_callbacks(runs: Runs) -> Any:
    found: list[Any] = []
    for path in (None, runs.folder / "step=6.ckpt"):
        how = saving(runs)
        callbacks = [Remembering(), EarlyStopping("loss", patience=5)]
        how["callbacks"] = [*callbacks, *how["callbacks"]] if path is None else callbacks
        module, data, trainer = RememberingNet(), RememberingData(), runs.trainer(**how)
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=False)
        of_stopper = {k: v for k, v in callbacks[1].state_dict().items()}
        found.append(
            [
                computed(trainer, module),
                callbacks[0].state,
                callbacks[0].loaded,
                of_stopper,
                data.loaded,
            ]
        )
    return [*found, module.loaded]


class WithMetric(Net):
    """Its state_dict has a metric's state."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()
        self.metric.persistent(True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.metric.update(torch.tensor(float(self.global_step)))
        return super().training_step(batch, batch_idx)


class WithExtraState(Net):
    """Has extra state, a tensor, which a checkpoint must give back."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.zeros(2)

    def get_extra_state(self) -> Tensor:
        return self.extra.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.extra = state.clone()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.extra += 1
        return super().training_step(batch, batch_idx)


class Renaming(Net):
    """Saves its head as a copy, in another unit, by hooks of state_dict, as quantisers do."""

    def __init__(self) -> None:
        super().__init__()
        self.head.register_state_dict_post_hook(self.double)
        self.head.register_load_state_dict_pre_hook(self.halve)

    @staticmethod
    def double(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2

    @staticmethod
    def halve(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2


@feature
def persistent_metrics(runs: Runs) -> Any:
    return resumed(runs, WithMetric)


@feature
def extra_state(runs: Runs) -> Any:
    return resumed(runs, WithExtraState)


@feature
def hooks_of_state_dict(runs: Runs) -> Any:
    return resumed(runs, Renaming)


class Lenient(Net):
    """Its checkpoints lack the head."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["head.weight"]


@feature
def strict_loading(runs: Runs) -> Any:
    return resumed(runs, Lenient)


class Reading(Net):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["head.bias"].fill_(3.0)


@feature
def on_load_checkpoint_that_reads_weights(runs: Runs) -> Any:
    return resumed(runs, Reading)


@feature
def checkpoints_of_accumulated_steps(runs: Runs) -> Any:
    """A validation inside a step asks for a checkpoint."""
    inside = {"accumulate_grad_batches": 2, "val_check_interval": 3, "val": loader(8)}
    how = saving(runs, monitor="val_loss", every_n_train_steps=None, save_top_k=-1)
    end = runs.fit(**how, **inside)
    seen = sorted(Path(path).name for path in how["callbacks"][0].best_k_models)
    return [end, seen, runs.fit(ckpt_path=runs.folder / seen[0], **inside)]


@feature
def save_checkpoint_after_fit(runs: Runs) -> Any:
    module, trainer = Net(), runs.trainer()
    trainer.fit(module, loader())
    trainer.save_checkpoint(runs.folder / "after.ckpt")
    file = in_one_file(runs.folder / "after.ckpt")
    loaded = Net.load_from_checkpoint(file, weights_only=True)
    tested = trainer.test(
        module, loader(8), ckpt_path=runs.folder / "after.ckpt", verbose=False, weights_only=False
    )
    return [runs.files(), clones(loaded.state_dict()), tested]


@feature
def a_path_that_does_not_exist(runs: Runs) -> Any:
    try:
        runs.fit(ckpt_path=runs.folder / "none.ckpt")
    except FileNotFoundError:
        return "no file"


@feature
def a_checkpoint_after_an_exception(runs: Runs) -> Any:
    """Here all ranks raise. Under ddp a single one would wait for the others without end."""
    saver = OnExceptionCheckpoint(runs.folder, "failed")
    said = error_of(lambda: runs.fit(Failing(), callbacks=[saver], enable_checkpointing=True))
    torch.distributed.barrier()
    return {"said": said, "files": runs.files()}
