"""What users do with Lightning's own parts: callbacks that fine-tune, link or copy, batches of any
length, SLURM."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.engine.ranks import run_ranks
from scmoe.api import MoE
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.models.halves import Halves
from scmoe.models.run_as import run_as, schedule_of
from scmoe.moe.layout import Buffers
from scmoe.moe.router import Router, Scoring
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.saving import Saving
from scmoe.parallel.wire.dispatchers import make_dispatcher
from tests.support.resuming import exit_code
from tests.support.trainings import end_groups, users_trainer

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

DIM = 16
BATCHES = 2  # of a rank in an epoch


class Model(LightningModule):
    """factor: the capacity factor of its MoE."""

    def __init__(self, factor: float | None = None) -> None:
        super().__init__()
        self.factor = factor
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU())

    def configure_model(self) -> None:
        if not hasattr(self, "moe"):
            torch.manual_seed(1)
            self.moe = MoE(DIM, 8, capacity_factor=self.factor, group=self.wire)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.backbone(x))[0]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


def data(batches: int = 2, batch_size: int = 2) -> DataLoader[Any]:
    """Return batches for two ranks, so many for each."""
    number = 2 * batch_size * batches
    rows = torch.randn(number, 6, DIM, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(rows), batch_size=batch_size)


def trainer_of(world_size: int, *callbacks: Callback, strategy: Any = None, **further: Any) -> Any:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    keep = {"callbacks": list(callbacks), "enable_checkpointing": saves}
    return users_trainer(world_size, strategy or ExpertParallelStrategy(), **(keep | further))


# ---------------------------------------------------------------------- copies


class Copying(Callback):
    """Copies and pickles the module, the callbacks and the Trainer in a step.

    It refers to the Trainer, as a progress bar does.
    """

    def __init__(self) -> None:
        self.copied: Any = None
        self.trainer: Any = None
        self.kept = False

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.copied = None
        self.trainer = trainer
        copy_and_pickle(trainer)
        self.copied = copy.deepcopy(pl_module)
        self.copied.eval()
        pl_module.eval()
        with torch.no_grad():
            self.kept = torch.equal(self.copied(batch[0]), pl_module(batch[0]))
        pl_module.train()
        pickle.dumps(pl_module)


def copy_and_pickle(trainer: Any) -> None:
    copy.deepcopy(trainer.callbacks)
    copy.deepcopy(trainer)
    torch.save(trainer, io.BytesIO())


def copies(rank: int, world_size: int, folder: Path, background: bool) -> dict[str, Any]:
    callback, module = Copying(), Model()
    trainer = trainer_of(
        world_size,
        callback,
        ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1),
        strategy=ExpertParallelStrategy(async_checkpoint=background),
        max_steps=3,
    )
    trainer.fit(module, data())
    copy_and_pickle(trainer)
    found: dict[str, Any] = {"same": callback.kept}
    weight, x = module.backbone[0].weight, torch.ones(1, 6, DIM)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.backbone[0].weight.zero_()
        found["own weights"] = bool(weight.abs().sum() > 0)
        read = pickle.loads(pickle.dumps(module))
        found["read weights"] = torch.equal(read.backbone[0].weight, weight)
        found["place"] = (read.wire.mesh.ep_size, read.wire.mesh.ep_group)
        with pytest.raises(RuntimeError, match="pickle"):
            read(x)
    torch.save(module, io.BytesIO())
    return found


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_modules_and_trainers_can_be_copied_and_pickled_in_hooks_and_after_fit(
    background, tmp_path
):
    expected = {"same": True, "own weights": True, "read weights": True, "place": (2, None)}
    assert run_ranks(copies, 2, tmp_path, background) == [expected] * 2
    assert len(list(tmp_path.glob("*.ckpt"))) == 3, "a copy has ended no save of the original"


# ---------------------------------------------------------------------- numbers of tokens


class Lengths(Model):
    """Rank 1 has a longer text in its second batch. shown: batches have different shapes, or the
    module cuts them."""

    def __init__(self, factor: float | None, shown: bool) -> None:
        super().__init__(factor)
        self.shown, self.steps = shown, 0

    def configure_model(self) -> None:
        super().configure_model()
        self.more = MoE(DIM, 8, capacity_factor=self.factor, group=self.wire)

    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [self.cut(batch[0])] if self.shown else batch

    def cut(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x if self.steps != 2 or self.wire.mesh.rank == 1 else x[:, :4]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.backbone(batch[0])
        # shown: the second module alone is uneven
        first, second = (x[:, :4], x) if self.shown else (self.cut(x),) * 2
        return self.moe(first)[0].mean() + self.more(second)[0].mean()


def uneven(rank: int, world_size: int) -> list[str]:
    said = []
    for factor, shown in ((None, True), (2.0, True), (2.0, False)):
        module = Lengths(factor, shown)
        try:
            trainer_of(world_size, max_steps=3).fit(module, data(3))
            said.append(f"step {module.global_step}")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.representative
def test_ranks_with_different_numbers_of_tokens_are_named_in_training_with_a_capacity():
    """gloo would end the process without a traceback. Without a capacity the numbers may differ."""
    for dropless, *refused in run_ranks(uneven, 2):
        assert dropless == "step 3"
        for said in refused:
            assert (
                "different numbers of tokens" in said and "rank 0: " in said and "rank 1: " in said
            )


class Dropping(Model):
    """Has two batches in flight, and keeps a number of sequences that depends on the rank. Their
    first halves are equal."""

    def __init__(self, kept: list[int]) -> None:
        super().__init__(factor=2.0)
        self.kept = kept
        self.halves = Halves()
        run_as(self, replace(schedule_of(self), batches_in_flight=2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.backbone(batch[0])[: self.kept[self.wire.mesh.rank]]
        return self.halves(self.through, x, None)[0].square().mean()

    def through(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Any]]:
        y, stats = self.moe(x, mask)
        return y, [stats]


def uneven_second_halves(rank: int, world_size: int) -> list[str]:
    said = []
    for kept in ([1, 2], [4, 3], [3, 3]):
        module = Dropping(kept)
        try:
            trainer_of(world_size, max_steps=1).fit(module, data(2, batch_size=4))
            said.append(f"step {module.global_step}")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.representative
def test_different_numbers_of_tokens_in_second_halves_are_named():
    """Batches have equal shapes, so each half is compared once."""
    for *refused, even in run_ranks(uneven_second_halves, 2):
        assert even == "step 1"
        for said in refused:
            assert "different numbers of tokens" in said


# ---------------------------------------------------------------------- callbacks


class Unfreezing(BackboneFinetuning):
    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)


def finetuned(rank: int, world_size: int, folder: Path) -> list[Any]:
    """Train two epochs, the second with the backbone, resume for a third, and fit again with the
    same Trainer.

    Return the sizes of the resumed parameter groups, the steps of the backbone's first weight, and
    the number of groups of the new fit."""
    found: list[Any] = []
    saver = ModelCheckpoint(
        folder, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )
    resumed = Model()
    trainer_of(world_size, Unfreezing(), saver, max_epochs=2).fit(Model(), data())
    trainer = trainer_of(world_size, Unfreezing(), max_epochs=3)
    trainer.fit(resumed, data(), ckpt_path=folder / "epoch=1.ckpt")
    found.append([len(group["params"]) for group in trainer.optimizers[0].param_groups])
    found.append(int(trainer.optimizers[0].state[resumed.backbone[0].weight]["step"]))
    trainer.fit_loop.max_epochs = 4
    trainer.fit(Model(), data())
    found.append(len(trainer.optimizers[0].param_groups))
    return found


def none(rank: int, world_size: int, folder: Path) -> int:
    module = Model()
    module.configure_optimizers = lambda: None  # type: ignore[method-assign]
    trainer = trainer_of(world_size, max_steps=-1, max_epochs=1)
    trainer.fit(module, data())
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


class Scored(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("loss", float(batch_idx))
        return super().training_step(batch, batch_idx)


def in_background(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Save in the background under one name, with a link to the last one. A save completes one
    step late at least."""
    found: dict[str, Any] = {}
    best = ModelCheckpoint(
        folder / "best", "best", every_n_train_steps=1, monitor="loss", save_top_k=3
    )
    linking = ModelCheckpoint(folder / "link", "{step}", every_n_train_steps=1, save_last="link")
    strategy = ExpertParallelStrategy(async_checkpoint=True)
    trainer_of(world_size, best, strategy=strategy, max_steps=3).fit(Scored(), data(3))
    end_groups()
    last, finish = folder / "link" / "last.ckpt", Saving.finish
    is_whole: list[bool] = []  # last.ckpt, before each checkpoint is complete
    linked: list[bool] = []

    def noted(saving: Saving) -> None:
        if saving.path.parent.name == "link":
            is_whole.append((last / durable.MANIFEST).is_file())
            linked.append(last.is_symlink())
        finish(saving)

    Saving.finish = noted  # type: ignore[method-assign]
    try:
        strategy = ExpertParallelStrategy(async_checkpoint=True)
        trainer_of(world_size, linking, strategy=strategy, max_steps=3).fit(Model(), data(3))
    finally:
        Saving.finish = finish  # type: ignore[method-assign]
    found["best"] = {path.name: durable.verify(path) for path in (folder / "best").glob("*.ckpt")}
    found["before"] = is_whole, linked
    found["last"] = durable.verify(last.resolve())
    return found


def early(rank: int, world_size: int, folder: Path) -> str:
    """Save before fit."""
    trainer, module = trainer_of(world_size, max_steps=1), Model()
    module.moe = MoE(DIM, 8)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "early.ckpt")
    return "saved"


def left_behind(rank: int, world_size: int, folder: Path) -> Any:
    """Return the variable and the threads that a fit leaves."""
    del os.environ["GLOO_SOCKET_IFNAME"]  # run_ranks has set it
    trainer_of(world_size, max_steps=2).fit(Model(), data())
    left = os.environ.get("GLOO_SOCKET_IFNAME")
    return left, [thread.name for thread in threading.enumerate() if thread.name == "gradients"]


def parts(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Return what each function returns, or its error, which is the same on all ranks."""
    found = {}
    for part in (early, left_behind, finetuned, none, in_background, unfrozen):
        try:
            found[part.__name__] = part(rank, world_size, folder / part.__name__)
        except Exception as error:
            found[part.__name__] = repr(error)
        if part is not early:
            end_groups()
    return found


class Biased(Model):
    def configure_model(self) -> None:
        super().configure_model()
        self.moe.router = Router(DIM, 8, 2, scoring=Scoring(rule=torch.sign))
        self.requires_grad_(True)


def unfrozen(rank: int, world_size: int, folder: Path) -> bool:
    module = Biased()
    trainer_of(world_size, max_steps=2).fit(module, data())
    return module.moe.router.bias.weight.requires_grad


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(parts, 2, tmp_path_factory.mktemp("parts"), timeout_s=200)


def test_a_finetuning_callback_resumes_after_it_has_unfrozen(found):
    for rank in found:
        groups, steps, later = rank["finetuned"]
        assert len(groups) == 2 and steps >= BATCHES and later == 1


def test_a_fit_leaves_no_variable_and_no_thread(found):
    assert [rank["left_behind"] for rank in found] == [(None, [])] * 2


def test_a_module_without_optimizers_runs(found):
    assert [rank["none"] for rank in found] == [BATCHES] * 2


def test_checkpoints_in_the_background_have_names_of_their_own_and_last_is_whole(found):
    for rank in found:
        background = rank["in_background"]
        assert sorted(background["best"].values()) == [1, 2, 3]
        assert background["last"] == 3
        assert background["before"] == ([False, True, True],) * 2, (
            "a link leads to a complete checkpoint"
        )


def test_a_selection_bias_is_never_trained(found):
    assert [rank["unfrozen"] for rank in found] == [False, False]


def test_a_save_before_fit_says_when_to_save(found):
    assert all("no checkpoint can be saved here" in rank["early"] for rank in found)


# ---------------------------------------------------------------------- signals


class Signalled(Model):
    """Rank 1 receives this signal in its third step."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def on_train_start(self) -> None:
        self.handler = signal.getsignal(self.number)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 2 and self.wire.mesh.rank == 1:
            os.kill(os.getpid(), self.number)


class Tasks(TorchElasticEnvironment, SLURMEnvironment):
    """Ranks of run_ranks as tasks of SLURM."""

    def __init__(self) -> None:
        TorchElasticEnvironment.__init__(self)
        self.auto_requeue, self.requeue_signal = True, signal.SIGUSR1


def signalled(rank: int, world_size: int, folder: Path, number: int, background: bool) -> Any:
    os.environ.update(SLURM_JOB_ID="7", PATH=f"{folder}:{os.environ['PATH']}")
    signal.signal(number, signal.SIG_DFL)  # tests that `nohup` started ignore SIGHUP
    strategy = ExpertParallelStrategy(async_checkpoint=background)
    keep = {"default_root_dir": folder, "max_steps": 50}
    trainer = trainer_of(world_size, strategy=strategy, plugins=[Tasks()], **keep)
    return exit_code(lambda: trainer.fit(Signalled(number), data(50)))


def test_a_signal_to_requeue_saves_at_one_step_and_requeues_once(tmp_path):
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" $(ls -d {tmp_path}/*.ckpt) >> {tmp_path}/asked\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    codes = run_ranks(signalled, 2, tmp_path, signal.SIGUSR1, True)
    assert codes[1] == 128 + signal.SIGUSR1
    (saved,) = tmp_path.glob("*.ckpt")
    assert saved.name == "hpc_ckpt_1.ckpt" and durable.verify(saved) in (3, 4)
    assert (tmp_path / "asked").read_text() == f"requeue 7 {saved}\n", (
        "once, and the checkpoint is complete then"
    )


def test_a_terminal_that_is_gone_stops_a_run_as_sigterm_does(tmp_path):
    codes = run_ranks(signalled, 2, tmp_path, signal.SIGHUP, False)
    assert codes[1] == 128 + signal.SIGHUP
    (saved,) = tmp_path.glob("*.ckpt")
    assert durable.verify(saved) in (3, 4)


class Buffered(Model):
    """Has rows in buffers."""

    def configure_model(self) -> None:
        super().configure_model()
        self.moe.arrange_as(Buffers(2.0))
        self.moe.dispatcher = make_dispatcher(self.wire, 8, buffered=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        length = 4 if self.wire.mesh.rank == 0 and batch_idx == 1 else None
        self(batch[0][:, :length])


def uneven_in_buffers(rank: int, world_size: int) -> str:
    try:
        trainer_of(world_size, max_steps=1).validate(Buffered(), data(2), verbose=False)
    except ValueError as error:
        return str(error)
    return "validated"


@pytest.mark.representative
def test_different_numbers_of_tokens_are_named_in_a_validation_with_buffers():
    for said in run_ranks(uneven_in_buffers, 2):
        assert "rank 0: " in said and "not in buffers" in said
