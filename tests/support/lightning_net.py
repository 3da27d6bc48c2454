"""This module has a small network without experts, data for it, and what a training of it has
computed.

`Runs` makes the Trainers of one feature of Lightning, with one of the two strategies that are
compared.
"""

from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scmoe.parallel.checkpoint.loading import load_checkpoint
from scmoe.parallel.checkpoint.remote import has_manifest, located
from tests.support.trainings import users_trainer

DIM, HIDDEN = 4, 8


class Net(LightningModule):
    """Keeps the loss of each step. make_optimizer: gets the parameters."""

    def __init__(self, lr: float = 0.05, make_optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(1)  # of every layer, those of a class that extends this one too
        self.lr, self.make_optimizer = lr, make_optimizer
        self.backbone = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))
        self.head = nn.Linear(HIDDEN, 1)
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).tanh())

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.detach().clone())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=self.lr)


def rows(number: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    x = torch.randn(number, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return TensorDataset(x, x.sin().sum(1, keepdim=True))


def loader(number: int = 16, **how: Any) -> DataLoader[Any]:
    """Return batches of two rows: four of each epoch on each of two ranks."""
    return DataLoader(rows(number), **({"batch_size": 2} | how))


def computed(trainer: Trainer, module: Net) -> dict[str, Any]:
    """Return what must be equal: losses, weights, the optimizers' states, learning rates, metrics,
    and counts."""
    named = dict(module.named_parameters())
    of_optimizers = trainer.optimizers
    return {
        "losses": list(module.losses),
        "weights": clones(module.state_dict()),
        "moments": [
            {name: clones(optimizer.state[p]) for name, p in named.items() if p in optimizer.state}
            for optimizer in of_optimizers
        ],
        "rates": [group["lr"] for optimizer in of_optimizers for group in optimizer.param_groups],
        "schedulers": [
            config.scheduler.state_dict().get("last_epoch")
            for config in trainer.lr_scheduler_configs
        ],
        "metrics": clones(trainer.callback_metrics),
        "logged": clones(trainer.logged_metrics),
        "counts": [
            trainer.global_step,
            trainer.current_epoch,
            trainer.should_stop,
            str(trainer.state.status),
        ],
    }


def clones(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in values.items()}


class Runs:
    """Makes one feature's Trainers. make_strategy: a class of strategies. folder: shared by the
    ranks."""

    def __init__(self, rank: int, make_strategy: Callable[..., Any], folder: Path) -> None:
        self.rank, self.make_strategy, self.folder = rank, make_strategy, folder

    def trainer(self, of_strategy: Mapping[str, Any] | None = None, **how: Any) -> Trainer:
        """Return a Trainer of two epochs. of_strategy: arguments of the strategy."""
        usual = {"max_epochs": 2, "default_root_dir": self.folder}
        return users_trainer(2, self.make_strategy(**(of_strategy or {})), **(usual | how))

    def fit(
        self,
        module: Net | None = None,
        data: Any = None,
        val: Any = None,
        ckpt_path: Any = None,
        **how: Any,
    ) -> dict[str, Any]:
        """Train and return what was computed. how: arguments of the Trainer."""
        module = Net() if module is None else module
        trainer = self.trainer(**how)
        trainer.fit(
            module, loader() if data is None else data, val, ckpt_path=ckpt_path, weights_only=False
        )
        return computed(trainer, module)

    def files(self) -> list[str]:
        """Return the names of this feature's checkpoints."""
        return sorted(
            path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.ckpt")
        )


FEATURES: dict[str, Callable[[Runs], Any]] = {}


def feature(use: Callable[[Runs], Any]) -> Callable[[Runs], Any]:
    """Add a function that uses one feature. Modules that import this one have them."""
    FEATURES[use.__name__] = use
    return use


def error_of(act: Callable[[], Any]) -> str:
    """Return the error's class and the first line of its message; an empty string if there is
    none."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def in_one_file(path: Any) -> Any:
    """Return what Lightning reads: a folder of the Strategy as a file in memory, other paths as
    they are."""
    if not has_manifest(located(path)):
        return path
    file = BytesIO()
    torch.save(load_checkpoint(path), file)
    file.seek(0)
    return file


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested containers, with a path as its name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        yield f"{name}/length", len(value)
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}/{i}")
    else:
        yield name, value


def differences(ddp: Any, ours: Any) -> list[str]:
    """Return a line for each leaf that is not equal to the last bit. NaN is equal to NaN."""
    here, there = dict(leaves(ours)), dict(leaves(ddp))
    names = [*there, *(name for name in here if name not in there)]
    if "/error" in names:
        names = ["/error"]  # everything else is absent where a feature has raised
    return [
        f"{name}: {there.get(name, 'absent')} under ddp, {here.get(name, 'absent')} under"
        " expert_parallel"
        for name in names
        if not is_same(there.get(name, "absent"), here.get(name, "absent"))
    ]


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        )
    return type(a) is type(b) and bool(a == b)
