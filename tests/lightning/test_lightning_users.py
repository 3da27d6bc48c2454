"""What users of Lightning do: modules of their own (faults 41, 56, 57, 59), the strategy's
arguments (51, 54)."""

from __future__ import annotations

import logging
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.utilities.model_summary import summarize
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, TensorDataset

import scmoe
from experiments.engine.ranks import run_ranks
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.wire.dispatchers import make_dispatcher
from scmoe.parallel.wire.wire import Wire
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.modules import LanguageModel
from tests.support.failing import failure
from tests.support.trainer_of import trainer_of
from tests.support.trainings import tiny, users_trainer

pytestmark = [pytest.mark.ranks, pytest.mark.faults, pytest.mark.representative]


class Model(LightningModule):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.dim, self.wire = dim, Wire()

    def stream(self) -> MoEStream:
        experts = Experts(self.dim, 32, 8, self.wire.mesh.local_experts(8))
        return MoEStream(Router(self.dim, 8, 1), experts, make_dispatcher(self.wire, 8))

    def configure_model(self) -> None:
        if not hasattr(self, "moe"):
            self.moe = self.stream()
            # a tied weight, as that of a language model's head
            self.same_gate = self.moe.router.gate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.moe(batch[0])[0].square().mean()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.moe(batch[0])[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def data() -> DataLoader[Any]:
    rows = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(rows), batch_size=2)


@torch.no_grad()
def predictions_of(module: Model) -> Tensor:
    return torch.cat([module.moe(rows)[0] for (rows,) in data()])


def fit(rank: int, world_size: int, folder: Path, callbacks: list[Callback]) -> Tensor:
    """Train one step and return the trained model's predictions of all rows."""
    keep = {"default_root_dir": folder, "callbacks": callbacks, "enable_checkpointing": True}
    trainer = users_trainer(world_size, ExpertParallelStrategy(), max_steps=1, **keep)
    module = Model(16)
    trainer.fit(module, data())
    return predictions_of(module)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Tensor]:
    """Return the checkpoint of two ranks, a directory, and the predictions of its model."""
    folder = tmp_path_factory.mktemp("trained")
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1)
    predictions, _ = run_ranks(fit, 2, folder, [saver])
    return folder / "step=1.ckpt", predictions


# -------------------------------------------------- a checkpoint that is a directory


def test_one_process_reads_a_directory_of_any_number_of_ranks(trained, tmp_path):
    """By scmoe.load_checkpoint; as one file by load_from_checkpoint and by a Trainer without the
    Strategy."""
    path, expected = trained
    assert path.is_dir()
    checkpoint = scmoe.load_checkpoint(path)
    module = Model(**checkpoint["hyper_parameters"])
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    assert len(module.moe.experts.expert_ids) == 8
    torch.testing.assert_close(predictions_of(module), expected, rtol=0, atol=1e-6)
    file = tmp_path / "one.ckpt"
    torch.save(checkpoint, file)
    module = Model.load_from_checkpoint(file)
    torch.testing.assert_close(predictions_of(module), expected, rtol=0, atol=1e-6)
    first, second = users_trainer(1, "auto").predict(Model(16), data(), ckpt_path=file)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=1e-6)


def test_a_damaged_directory_is_refused(trained, tmp_path):
    checkpoint, _ = trained
    broken = tmp_path / "broken.ckpt"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[:-1] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        scmoe.load_checkpoint(broken)


def test_this_librarys_own_modules_say_what_load_from_checkpoint_lacks():
    with pytest.raises(TypeError, match=r"LanguageModel\.load_from_checkpoint lacks make_model\."):
        LanguageModel.load_from_checkpoint("runs/latest")


def test_this_librarys_own_modules_read_a_directory_and_a_file(tmp_path):
    config = tiny("position=pos2 trainer.max_steps=1 trainer.precision=32-true")
    module = build_module(config)
    trainer_of(config, [], []).fit(module, build_datamodule(config))
    module.trainer.save_checkpoint(tmp_path / "folder.ckpt")
    torch.save(scmoe.load_checkpoint(tmp_path / "folder.ckpt"), tmp_path / "file.ckpt")
    make = {"make_model": partial(scmoe.build_model, config), "max_steps": 1}
    for path in (tmp_path / "folder.ckpt", tmp_path / "file.ckpt"):
        read = LanguageModel.load_from_checkpoint(path, map_location="cpu", **make)
        torch.testing.assert_close(read.state_dict(), module.state_dict(), rtol=0, atol=0)


# -------------------------------------------------- saving and loading as Lightning does


class Grouped(Model):
    """Has a parameter group more than Model."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": list(part.parameters())} for part in (self.moe.router, self.moe.experts)
        ]
        return torch.optim.AdamW(groups, lr=0.1)


class Partial(Model):
    """Its checkpoints lack the router."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["moe.router.gate.weight"]


class Reading(Model):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].clear()


def used(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Save and load in many ways, on the ranks of one start. Return what came of each."""
    (folder / str(rank)).mkdir(parents=True)
    found: dict[str, Any] = {}

    def trained(module: Model, background: bool = False, **given: Any) -> Any:
        how = {
            "callbacks": [ModelCheckpoint(folder / "saver", save_top_k=0)],
            "enable_checkpointing": True,
        }
        trainer = users_trainer(
            world_size, ExpertParallelStrategy(async_checkpoint=background), max_steps=1, **how
        )
        trainer.fit(module, data(), **given)
        return trainer

    def error(act: Any) -> str:
        try:
            act()
        except (OSError, TypeError, ValueError) as refused:
            return str(refused)
        return ""

    for background in (True, False):
        module = Model(16)
        trainer = trained(module, background)
        trainer.save_checkpoint(folder / f"after-{background}.ckpt")
        found[f"after {background}"] = sorted(path.name for path in folder.glob("*after*"))

    (optimizer,) = trainer.optimizers
    before = dict(optimizer.state)
    trainer.predict(Grouped(16), data(), ckpt_path=folder / "after-False.ckpt")
    kept = [optimizer.state.get(p) is state for p, state in before.items()]
    found["kept state"] = all(kept) and len(kept) == len(optimizer.state) > 0
    saved = {"ckpt_path": folder / "after-True.ckpt"}
    found["groups"] = error(lambda: trained(Grouped(16), **saved))
    found["state_dict"] = error(lambda: trained(Reading(16), **saved))

    first, other = Partial(16), Partial(16)
    partial = trained(first)
    partial.save_checkpoint(folder / "partial.ckpt")
    torch.manual_seed(7)
    partial.predict(other, data())  # gives it weights
    own = other.moe.router.gate.weight.detach().clone()
    partial.predict(other, data(), ckpt_path=folder / "partial.ckpt")
    found["kept router"] = torch.equal(other.moe.router.gate.weight, own)
    found["loaded experts"] = torch.equal(other.moe.experts.w_in_eDF, first.moe.experts.w_in_eDF)
    found["strict"] = error(
        lambda: partial.predict(Model(16), data(), ckpt_path=folder / "partial.ckpt")
    )

    victim = folder / "victim"
    for there in (victim, folder / "saver"):
        there.mkdir(exist_ok=True)
    for path in (folder / "saver" / ".." / "victim", folder / "saver" / ".."):
        trainer.strategy.remove_checkpoint(path)
    trainer.strategy.barrier()
    found["victim"] = victim.exists()

    trainer = trained(Model(16))
    os.chdir(folder / str(rank))  # as on nodes that share no storage
    found["not shared"] = error(lambda: trainer.save_checkpoint("own.ckpt"))
    found["left"] = os.listdir()
    return found


@pytest.fixture(scope="module")
def users(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(used, 2, tmp_path_factory.mktemp("users"))


def test_a_checkpoint_that_is_saved_after_fit_is_complete_at_once(users):
    """Also with async_checkpoint: nothing would complete it later."""
    for found in users:
        assert found["after True"] == ["after-True.ckpt"]
        assert found["after False"] == ["after-False.ckpt", "after-True.ckpt"]


def test_loading_changes_no_optimizer_of_fit_and_refuses_other_groups_and_hooks(users):
    for found in users:
        assert found["kept state"]
        assert "1 parameter groups of optimizer 0, which begin with moe." in found["groups"]
        assert found["kept router"] and found["loaded experts"]
        assert (
            "holds another model: model.moe.router.gate.weight is absent there" in found["strict"]
        )
        assert "on_load_checkpoint reads checkpoint['state_dict']" in found["state_dict"]


def test_nothing_outside_the_folders_of_checkpoints_is_removed(users):
    """The paths may come from another person's checkpoint."""
    assert all(found["victim"] for found in users)


def test_a_folder_that_nodes_do_not_share_is_an_error_of_the_save(users):
    for found in users:
        assert "the folder must be on storage that all nodes share" in found["not shared"]
        assert found["left"] == []


# -------------------------------------------------- experts that are built too early or too late


class Early(Model):
    """when: the MoE module is built in __init__, or one more is added after fit has begun. Each
    rank would train all its experts, which drift apart, and a checkpoint would hold them once for
    each rank."""

    def __init__(self, when: str) -> None:
        super().__init__(16)
        self.when = when
        if when == "in __init__":
            super().configure_model()

    def on_train_start(self) -> None:
        if self.when == "added":
            self.more = self.stream()


def fit_early(rank: int, world_size: int, when: str, ep_size: int | None) -> None:
    users_trainer(world_size, ExpertParallelStrategy(ep_size), max_steps=1).fit(Early(when), data())


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (
            "in __init__",
            (
                r"ValueError: moe\.experts holds experts 0 to 7 on rank \d, but this rank must"
                r" hold (0 to 3|4 to 7) of 8\. "
            ),
        ),
        ("added", r"ValueError: more\.experts\.w_in_eDF was added after fit had begun"),
    ],
)
def test_experts_that_the_strategy_cannot_shard_are_refused(when, message):
    assert re.search(message, failure(fit_early, 2, when, None))


def test_experts_in_init_are_accepted_where_each_rank_has_all():
    run_ranks(fit_early, 2, "in __init__", 1)


# -------------------------------------------------- callbacks that copy the module


def fit_averaged(rank: int, world_size: int, folder: Path, name: str) -> None:
    callback = (
        EMAWeightAveraging() if name == "EMAWeightAveraging" else StochasticWeightAveraging(0.1)
    )
    fit(rank, world_size, folder, [callback])


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_callbacks_that_average_weights_in_a_copy_are_refused_by_name(name, tmp_path):
    said = failure(fit_averaged, 2, tmp_path, name)
    assert f"ValueError: the callback {name} keeps a copy" in said
    assert "AttributeError" not in said, "no error of closing what was not opened"


# ---------------------------------------------------------------------- how many parameters


def summarised(rank: int, world_size: int) -> tuple[int, list[str]]:
    """Return the expert parameters that Lightning's summary counts, and what the strategy says of
    them."""
    said: list[str] = []
    logger = logging.getLogger("lightning.pytorch")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    trainer, module = (
        users_trainer(world_size, "expert_parallel", max_steps=1, enable_model_summary=True),
        Model(16),
    )
    trainer.fit(module, data())
    return summarize(module).total_parameters, [line for line in said if "experts" in line]


def test_a_model_summary_says_that_it_counts_this_ranks_experts():
    (first, said), (_, nothing) = run_ranks(summarised, 2)
    gate, expert = 16 * 8, 2 * 16 * 32
    assert first == gate + 4 * expert
    assert (
        said == ["The model summary counts this rank's experts: 1 of 2 parts of them."]
        and nothing == []
    )


# ---------------------------------------------------------------------- the strategy's name


def fit_by_name(rank: int, world_size: int) -> list[Tensor]:
    """Train two steps of SGD, which shows every factor of a gradient, clipped with both
    strategies, then unclipped. Return predictions of all rows."""
    found = []
    for strategy, clip in (("expert_parallel", 0.01), ("ddp", 0.01), ("expert_parallel", None)):
        torch.manual_seed(1)
        trainer, module = (
            users_trainer(world_size, strategy, max_steps=2, gradient_clip_val=clip),
            Model(16),
        )
        module.configure_optimizers = lambda module=module: torch.optim.SGD(
            module.parameters(), lr=10.0
        )
        trainer.fit(module, data())
        found.append(predictions_of(module))
    return found


def test_a_trainer_takes_the_strategy_by_name_and_clips_as_with_ddp():
    """With `ddp` every rank trains all experts, so the result is the same but for the order of
    sums."""
    for split, whole, unclipped in run_ranks(fit_by_name, 2):
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)
        assert (unclipped - split).abs().max() > 1e-2


def handlers(rank: int, world_size: int) -> dict[str, list[Any]]:
    """Return the handlers of SIGINT and SIGTERM before a Trainer's first run and after each."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    trainer, module = users_trainer(1, "expert_parallel", max_steps=1), Model(16)
    module.validation_step = module.test_step = lambda batch, batch_idx: None
    found = {
        "before": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    }
    for verb in ("fit", "validate", "test", "predict"):
        getattr(trainer, verb)(module, data())
        found[verb] = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    return found


def test_after_a_run_ctrl_c_and_sigterm_do_what_they_did_before():
    """In a notebook Ctrl-C is KeyboardInterrupt again."""
    before, *after = run_ranks(handlers, 1)[0].values()
    assert after == [before] * 4


# ---------------------------------------------------------------------- arguments of the strategy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ep_size": 0}, "ep_size is 0, allowed: None or a number of ranks, 1 or more"),
        ({"ep_size": -2}, "ep_size is -2, allowed"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0, allowed: above 0, at most 1e"),
        ({"timeout_s": float("nan")}, "timeout_s is nan, allowed"),
        ({"timeout_s": 1e300}, r"timeout_s is 1e\+300, allowed"),
        ({"dense": "split"}, "dense is 'split', allowed: replicated, sharded, hybrid, auto"),
        ({"dense": "sharded", "find_unused_parameters": True}, "is an argument of DDP"),
    ],
    ids=str,
)
def test_arguments_that_no_run_could_have_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpertParallelStrategy(**arguments)


@pytest.mark.parametrize("plugin", [HalfPrecision("16-true"), MixedPrecision("16-mixed", "cpu")])
def test_float16_is_refused(plugin):
    """On a CPU, Lightning replaces 16-mixed by bf16-mixed, so the test passes the plugin."""
    with pytest.raises(
        ValueError, match=rf"trainer\.precision is {plugin.precision}, allowed: 32-true, bf16-mixed"
    ):
        users_trainer(2, ExpertParallelStrategy(), plugins=[plugin])


@pytest.mark.parametrize("arguments", [{"model_averaging_period": 4}, {"timeout": 60.0}], ids=str)
def test_arguments_of_ddp_that_cannot_be_honoured_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        ExpertParallelStrategy(**arguments)


def fit_fused(rank: int, world_size: int, algorithm: str) -> float:
    """Return the largest gradient of a step in bf16-mixed with a fused optimizer, clipped."""
    largest: list[float] = []

    class Fused(Model):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.1, fused=True)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            largest.extend(p.grad.abs().max().item() for p in self.parameters())

    how = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": algorithm}
    users_trainer(world_size, "expert_parallel", max_steps=1, precision="bf16-mixed", **how).fit(
        Fused(16), data()
    )
    return max(largest)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimizer_can_be_clipped_in_bf16(algorithm):
    assert all(0 < value <= 1.001e-4 for value in run_ranks(fit_fused, 2, algorithm))


class ByHand(Model):
    def __init__(self) -> None:
        super().__init__(16)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def fit_by_hand(rank: int, world_size: int) -> str:
    strategy = ExpertParallelStrategy(1, dense="sharded")
    try:
        users_trainer(world_size, strategy, max_steps=1).fit(ByHand(), data())
    except ValueError as error:
        return str(error)
    return "trained"


def test_manual_optimization_is_refused_where_dense_weights_are_split():
    """Gradients of weights outside of blocks would not be summed over ranks."""
    assert all("automatic_optimization=False" in said for said in run_ranks(fit_by_hand, 2))


OF_ALL_WEIGHTS: dict[str, Any] = {
    "ZeroRedundancyOptimizer": lambda p: ZeroRedundancyOptimizer(p, torch.optim.SGD, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1),
}


def fit_by(rank: int, world_size: int, name: str) -> str:
    class Other(Model):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OF_ALL_WEIGHTS[name](self.parameters())

    try:
        users_trainer(world_size, ExpertParallelStrategy(), max_steps=1).fit(Other(16), data())
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("name", OF_ALL_WEIGHTS)
def test_optimizers_that_mix_the_weights_of_ranks_are_refused(name):
    """The first would give all ranks the same experts, the second different dense weights."""
    said = run_ranks(fit_by, 2, name)
    assert all(f"the optimizer {name} is not supported" in line for line in said)


def seeds_of_gpu(rank: int, world_size: int) -> list[int]:
    """Return the seeds that the GPU's generator would get outside of training steps."""
    torch.manual_seed(1)
    with patch.object(torch.cuda, "manual_seed") as seeded:
        users_trainer(world_size, ExpertParallelStrategy(), max_steps=1).fit(Model(16), data())
    return [call.args[0] for call in seeded.call_args_list]


def test_outside_of_steps_the_gpus_of_all_ranks_have_one_seed():
    """Else an optimizer that draws would move each rank's dense weights in its own way."""
    first, second = run_ranks(seeds_of_gpu, 2)
    assert first == second != []
