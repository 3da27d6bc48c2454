"""State of users' code in checkpoints: extra state, metrics, hooks, callbacks, optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import CatMetric, MeanMetric

import scmoe
from experiments.engine.ranks import run_ranks
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel.checkpoint import durable
from tests.support.lightning_net import in_one_file
from tests.support.trainings import users_trainer

pytestmark = [pytest.mark.ranks, pytest.mark.faults, pytest.mark.representative]

LARGE = 1000  # elements; such tensors are not written as text


class Extra(nn.Module):
    """Its extra state is made by every call of state_dict."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


class Copied(nn.Module):
    """A hook saves a copy of its weight under another name, as quantisers do, and an override reads
    it back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))
        self.loaded = 0

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}halved"] = self.weight.detach() / 2

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.weight.data.copy_(state_dict[f"{prefix}halved"] * 2)
        self.loaded += 1


class Users(LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.wire = scmoe.Wire()
        self.extra = Extra(torch.tensor([0.0]))
        self.large = Extra(torch.zeros(LARGE))
        self.plain = Extra({"words": set()})
        self.copied, self.mean, self.values = Copied(), MeanMetric(), CatMetric()
        self.norm = nn.BatchNorm1d(16)
        for metric in (self.mean, self.values):
            metric.persistent(True)
        self.lr = lr
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if not hasattr(self, "moe"):
            group = self.wire if self.wire.mesh.world_size > 1 else None
            self.moe = scmoe.MoE(16, num_experts=4, top_k=2, group=group)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rows = self.norm(batch[0])
        loss = (self.moe(rows)[0] - rows.flip(1)).square().mean() + (self.copied.weight**2).sum()
        self.losses.append(float(loss.detach()))
        return loss

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.norm(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def data() -> DataLoader[Any]:
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(rows), batch_size=4)


def trainer_of(
    strategy: Any, *callbacks: Callback, world_size: int = 2, steps: int = 1, folder: Any = None
) -> Any:
    torch.manual_seed(3)
    saver = ModelCheckpoint(folder, "{step}", save_top_k=0)
    how = {
        "callbacks": [*callbacks, saver],
        "enable_checkpointing": True,
        "default_root_dir": folder,
    }
    return users_trainer(world_size, strategy, max_steps=steps, **how)


# ---------------------------------------------------------------------- what a module restores


def module_restored(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Save a module whose state differs between ranks, and load it into a new one, with ddp and
    with the Strategy."""
    found: dict[str, Any] = {}
    for strategy in ("ddp", "expert_parallel"):
        trainer, module = trainer_of(strategy, folder=folder), Users()
        trainer.fit(module, data())
        module.extra.value, module.large.value = torch.tensor([7.0]), torch.full((LARGE,), 3.0)
        module.plain.value = {"words": {"a", "b"}, "pair": (1, [rank, None])}
        with torch.no_grad():
            module.copied.weight.fill_(4.0)
        module.mean.reset(), module.values.reset()
        module.mean.update(torch.tensor([3.5, 3.5 + 2 * rank]))
        module.values.update(torch.arange(2.0 + rank))
        trainer.save_checkpoint(folder / f"{strategy}.ckpt")
        new = Users()
        trainer_of(strategy, folder=folder).fit(
            new, data(), ckpt_path=folder / f"{strategy}.ckpt", weights_only=False
        )
        found[strategy] = {
            "extra": new.extra.value.tolist(),
            "large": new.large.value.sum().item(),
            "plain": new.plain.value,
            "copied": (new.copied.weight.tolist(), new.copied.loaded),
            "mean": new.mean.mean_value.item() / new.mean.weight.item(),
            "values": torch.cat(new.values.value).tolist(),
        }
    return found


def test_any_module_restores_what_it_restores_under_ddp(tmp_path):
    """ddp gives rank 0's state to every rank. Here each has its own, which is that of an
    uninterrupted training."""
    first, second = run_ranks(module_restored, 2, tmp_path)
    assert first["expert_parallel"] == first["ddp"]
    expected = first["ddp"] | {"mean": 4.5, "values": [0.0, 1.0, 2.0]}
    assert second["expert_parallel"] == expected | {
        "plain": {"words": {"a", "b"}, "pair": (1, [1, None])}
    }
    file = in_one_file(tmp_path / "expert_parallel.ckpt")
    loaded = Users.load_from_checkpoint(file, strict=False)
    assert (loaded.extra.value.item(), loaded.copied.weight.tolist()) == (7.0, [4.0] * 3)


# -------------------------------------------------- state that differs between ranks


class Averages(Callback):
    """Averages this rank's weights, its experts among them."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.weights = {name: p.detach().clone() for name, p in module.moe.named_parameters()}
        self.seconds = 10.0 + trainer.global_rank

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


class Timed(Averages):
    """Its state are numbers, which differ too."""

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]


def callbacks_restored(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    averages, timed = Averages(), Timed()
    trainer = trainer_of("expert_parallel", averages, timed, folder=folder)
    trainer.fit(Users(), data())
    trainer.save_checkpoint(folder / "saved.ckpt")
    found: dict[str, Any] = {}
    for ep_size in (2, 1):
        callbacks = [Averages(), Timed()][2 - ep_size :]
        again = trainer_of(ExpertParallelStrategy(ep_size=ep_size), *callbacks, folder=folder)
        again.fit(Users(), data(), ckpt_path=folder / "saved.ckpt")
        found[f"seconds, EP {ep_size}"] = callbacks[-1].seconds
        if ep_size == 2:
            own = averages.weights
            read = callbacks[0].weights
            found["own"] = read.keys() == own.keys() and all(
                torch.equal(read[name], own[name]) for name in own
            )
    found["experts"] = averages.weights["experts.w_in_eDF"]
    try:
        trainer = trainer_of(ExpertParallelStrategy(ep_size=1), Averages(), folder=folder)
        trainer.fit(Users(), data(), ckpt_path=folder / "saved.ckpt")
    except ValueError as error:
        found["refused"] = str(error)
    return found


def test_each_rank_gets_its_own_state_of_callbacks_back(tmp_path):
    """In another layout of ranks, numbers are rank 0's and tensors an error by name; never another
    rank's experts."""
    ranks = run_ranks(callbacks_restored, 2, tmp_path)
    assert not torch.equal(ranks[0]["experts"], ranks[1]["experts"]), "else the test shows nothing"
    for rank, found in enumerate(ranks):
        assert found["own"]
        assert (found["seconds, EP 2"], found["seconds, EP 1"]) == (10.0 + rank, 10.0)
        assert "Averages" in found["refused"]
    assert (tmp_path / "saved.ckpt" / "meta.json").stat().st_size < 20_000, "tensors are no text"
    with pytest.warns(UserWarning, match="Averages"):
        checkpoint = scmoe.load_checkpoint(tmp_path / "saved.ckpt")
    module = Users()
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    with pytest.raises(ValueError, match="Averages"):
        users_trainer(1, scmoe.ExpertParallelStrategy(), callbacks=[Averages()]).predict(
            Users(), data(), ckpt_path=tmp_path / "saved.ckpt"
        )


# ---------------------------------------------------------------------- optimizers


def losses_after_search(rank: int, world_size: int, folder: Path) -> dict[str, list[float]]:
    """Search a learning rate, which trains and then restores the state from before, and trains
    five steps."""
    found = {}
    for strategy in ("ddp", "expert_parallel"):
        search = LearningRateFinder(
            num_training_steps=6, early_stop_threshold=None, update_attr=False
        )
        trainer, module = (
            trainer_of(strategy, search, world_size=1, steps=5, folder=folder),
            Users(lr=0.01),
        )
        trainer.fit(module, data())
        found[strategy] = module.losses[-5:]
    return found


def test_no_moments_are_left_of_a_search_for_a_learning_rate(tmp_path):
    (losses,) = run_ranks(losses_after_search, 1, tmp_path)
    assert losses["expert_parallel"] == losses["ddp"]


class Listing(torch.optim.SGD):
    """Keeps lists and None beside moments, an odd vector, and a number of its own."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(
                    history=[torch.ones(5), None], nothing=None, step=3, odd=torch.ones(LARGE)
                )
        self.state["of all"] = {"steps": 1}
        return loss


class Odd(LightningModule):
    """Has weights of one rank's own, and one that only the optimizer has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(16, 16), kind
        self.elsewhere = [nn.Parameter(torch.ones(3))]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.linear(batch[0]).square().mean() + self.elsewhere[0].square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [*self.linear.parameters(), *self.elsewhere]
        if self.kind == "lbfgs":
            return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)
        return Listing(parameters, lr=0.1, momentum=0.9)


def plain(state: Any) -> Any:
    """Return state of an optimizer in a form that can be compared."""
    if isinstance(state, Tensor):
        return [str(state.dtype), tuple(state.shape), *state.flatten().tolist()]
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, (list, tuple)) else state


def optimizers_restored(rank: int, world_size: int, folder: Path) -> list[bool]:
    equal = []
    for kind in ("lbfgs", "listing"):
        trainer = trainer_of("expert_parallel", folder=folder)
        trainer.fit(Odd(kind), data())
        trainer.save_checkpoint(folder / f"{kind}.ckpt")
        again = trainer_of("expert_parallel", folder=folder)
        again.fit(Odd(kind), data(), ckpt_path=folder / f"{kind}.ckpt")
        saved, read = (plain(t.optimizers[0].state_dict()["state"]) for t in (trainer, again))
        equal.append(bool(saved) and saved == read)
    return equal


def test_any_optimizer_gets_its_state_back(tmp_path):
    """LBFGS, lists, None, numbers, state of no parameter, a parameter outside of the module."""
    assert run_ranks(optimizers_restored, 2, tmp_path) == [[True, True]] * 2


# ---------------------------------------------------------------------- what cannot be saved


class Saving(LightningModule):
    """`add` changes what is saved. read: what on_load_checkpoint finds."""

    def __init__(self, add: Any) -> None:
        super().__init__()
        self.linear, self.add, self.steps = nn.Linear(16, 4), add, 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return self.linear(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.add(checkpoint, self.global_rank)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.read = checkpoint["words"]
        for key in ("state_dict", "optimizer_states"):
            assert key not in checkpoint and checkpoint.get(key) is None
            with pytest.raises(ValueError, match=key):
                checkpoint[key]


def add_complex(checkpoint: dict[str, Any], rank: int) -> None:
    checkpoint["waves"] = torch.zeros(4, dtype=torch.complex128)


def add_object(checkpoint: dict[str, Any], rank: int) -> None:
    checkpoint["thing"] = object() if rank == 1 else 1


def add_endless(checkpoint: dict[str, Any], rank: int) -> None:
    endless: list[Any] = []
    endless.append(endless)
    checkpoint["endless"] = endless if rank == 0 else []


def add_words(checkpoint: dict[str, Any], rank: int) -> None:
    checkpoint["words"] = {"a", ("b", 1)}


def refused(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Train eight steps with a first checkpoint at the seventh. Return after how many steps what
    is refused."""
    found: dict[str, Any] = {}
    for name, add in (("waves", add_complex), ("thing", add_object), ("endless", add_endless)):
        module, saver = Saving(add), ModelCheckpoint(folder / name, every_n_train_steps=7)
        how = {"callbacks": [saver], "enable_checkpointing": True}
        trainer = users_trainer(world_size, "expert_parallel", max_steps=8, **how)
        try:
            trainer.fit(module, data())
        except Exception as error:
            found[name] = (module.steps, name in str(error) or "recursion" in str(error))
    trainer, module = trainer_of("expert_parallel", folder=folder), Saving(add_words)
    trainer.fit(module, data())
    trainer.save_checkpoint(folder / "words.ckpt")
    again = Saving(add_words)
    trainer_of("expert_parallel", folder=folder).fit(again, data(), ckpt_path=folder / "words.ckpt")
    found["words"] = again.read
    try:
        trainer.fit(module, data(), ckpt_path=folder / "absent.ckpt")
    except FileNotFoundError as error:
        found["absent"] = "absent.ckpt" in str(error)
    return found


def test_what_cannot_be_saved_is_an_error_after_the_first_step(tmp_path):
    """On every rank, whichever rank has it."""
    expected = {name: (1, True) for name in ("waves", "thing", "endless")}
    expected |= {"words": {"a", ("b", 1)}, "absent": True}
    assert run_ranks(refused, 2, tmp_path) == [expected] * 2
    assert not [*tmp_path.glob("*/*.ckpt")]
    assert json.loads((tmp_path / "words.ckpt" / "meta.json").read_text())
    assert durable.verify(tmp_path / "words.ckpt") == 1


class Trusting(torch.optim.SGD):
    """Keeps the norm of each weight."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["trust"] = p.detach().norm()
        return loss


class WithExperts(LightningModule):
    def configure_model(self) -> None:
        if not hasattr(self, "moe"):
            torch.manual_seed(1)
            self.moe = scmoe.MoE(16, num_experts=2, top_k=2, group=self.wire)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.moe(batch[0])[0].square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Trusting(self.parameters(), lr=0.1)


def numbers_of_experts(rank: int, world_size: int, folder: Path) -> list[float]:
    """Return the number that the optimizer keeps of this rank's experts, before a save and after a
    load of it."""
    found = []
    for ckpt_path in (None, folder / "numbers.ckpt"):
        trainer, module = trainer_of("expert_parallel", folder=folder), WithExperts()
        trainer.fit(module, data(), ckpt_path=ckpt_path)
        found.append(trainer.optimizers[0].state[module.moe.experts.w_in_eDF]["trust"].item())
        if ckpt_path is None:
            trainer.save_checkpoint(folder / "numbers.ckpt")
    return found


def test_each_rank_gets_the_numbers_of_its_own_experts_back(tmp_path):
    """The second training has as many steps as the first, so it takes none."""
    (first, read_first), (second, read_second) = run_ranks(numbers_of_experts, 2, tmp_path)
    assert first != second
    assert [read_first, read_second] == [first, second]
