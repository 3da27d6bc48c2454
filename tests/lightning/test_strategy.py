"""These tests check the Strategy around the steps: resuming in the same or another layout,
refusals, registered name.

Trainings here are those of a user: AdamW with warm-up and cosine, checkpoints by ModelCheckpoint,
data position by DataPosition. A run resumed in the same layout is bit-identical to an uninterrupted
one, dropout included. In another layout the bound is 1e-12 in float64, because ranks do the same
sums in another order.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, random_split

from experiments.engine.ranks import RankError, run_ranks
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model
from scmoe.training.modules import LanguageModel
from scmoe.training.muon import adamw
from tests.support.comparison import TOLERANCE
from tests.support.lightning_net import Net, loader
from tests.support.resuming import HALF, WHOLE, fit, largest_difference, whole
from tests.support.trainer_of import trainer_of
from tests.support.trainings import RecordingModel, tiny, train, users_trainer

pytestmark = pytest.mark.ranks

MODEL = "position=pos2 top_k=2 optim.lr=0.01 optim.warmup_steps=2 trainer.max_steps=6"


# ---------------------------------------------------------------------- resume


def run(
    rank: int, world_size: int, text: str, folder: Path | None, checkpoint: Path | None
) -> dict[str, Any]:
    return fit(tiny(text, world_size), folder, checkpoint)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    """Return an uninterrupted run on two ranks with EP 2, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("written")
    return run_ranks(run, 2, f"{MODEL} strategy.ep_size=2", folder, None), folder


@pytest.mark.parametrize("world_size, ep_size", [(2, 1), (4, 2), (1, 1)])
def test_a_run_resumed_in_another_layout_equals_an_uninterrupted_one(world_size, ep_size, written):
    uninterrupted, folder = written
    words, checkpoint = f"{MODEL} strategy.ep_size={ep_size}", folder / f"step={HALF}.ckpt"
    resumed = run_ranks(run, world_size, words, None, checkpoint)
    error, name = largest_difference(resumed, uninterrupted)
    assert error <= TOLERANCE, name
    assert resumed[0]["consumed"] == uninterrupted[0]["consumed"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_further_training_changes_every_weight(written):
    """A weight that training does not change would be equal even if resuming did not restore it."""
    uninterrupted, folder = written
    reader = HuggingFaceStorageReader(str(folder / f"step={HALF}.ckpt"))
    early = {
        f"model.model.{name}": torch.empty_like(t)
        for name, t in whole(uninterrupted).items()
        if " " not in name
    }
    dcp.load(early, storage_reader=reader, no_dist=True)
    late = whole(uninterrupted)
    assert not [
        name for name, t in early.items() if torch.equal(t, late[name.removeprefix("model.model.")])
    ]


def test_a_checkpoint_holds_nothing_that_is_executed_when_read(written):
    _, folder = written
    assert {path.name for path in folder.iterdir()} == {f"step={HALF}.ckpt", f"step={WHOLE}.ckpt"}
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}


# ---------------------------------------------------------------------- what is refused

REFUSED = {  # words, or `seed`, or a damaged checkpoint: what is said
    "model.ffn_dim=32": (
        r"holds another model: model\.model\.blocks\.0\.\S+ is \(.*\) there and \(.*\) here"
    ),
    "moe.num_experts=4": (
        r"holds another model: model\.model\.blocks\.0\.moe\.\S+ is \(8, .*\) there and \(4, "
    ),
    "model.layers=4": r"holds another model: model\.model\.blocks\.1\.\S+ is absent there",
    "seed": r"the checkpoint's seed is 1, here it is 2",
    "without meta.json": r"partial\.ckpt\S* is (missing|not a complete checkpoint)",
}


def refused(rank: int, world_size: int, checkpoint: Path, partial: Path) -> dict[str, str]:
    """Return the error of each resumption."""
    said = {}
    for change in REFUSED:
        config = tiny(f"{MODEL} strategy.ep_size=2 {change if '=' in change else ''}", world_size)
        config = replace(config, seed=2) if change == "seed" else config
        try:
            fit(config, None, partial if change == "without meta.json" else checkpoint)
        except ValueError as error:
            said[change] = str(error)
    return said


def test_what_a_run_cannot_resume_from_is_refused_by_name(written, tmp_path):
    """Another model, another order of the data, and an incomplete checkpoint."""
    whole, partial = written[1] / f"step={HALF}.ckpt", tmp_path / "partial.ckpt"
    shutil.copytree(whole, partial, ignore=lambda *_: ["meta.json"])
    for said in run_ranks(refused, 2, whole, partial):
        assert said.keys() == REFUSED.keys()
        for change, expected in REFUSED.items():
            assert re.search(expected, said[change]), said[change]


# -------------------------------------------------- samplers without a generator of their own


class Seeing(LightningModule):
    """Notes the samples that this rank sees and the numbers that it draws in its steps, as dropout
    does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[list[int]] = []
        self.held_out: list[int] = []
        self.drawn: list[float] = []

    def train_dataloader(self) -> Any:
        train, held_out = random_split(TensorDataset(torch.arange(16)), [12, 4])
        self.held_out = list(held_out.indices)
        return DataLoader(train, batch_size=2, sampler=SubsetRandomSampler(range(12)))

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen[-1] += batch[0].tolist()
        self.drawn += torch.rand(1 + self.global_rank).tolist()  # as for texts of different lengths
        return self.weight.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sampled(
    rank: int, world_size: int, strategy: str
) -> tuple[list[list[int]], list[int], list[float]]:
    torch.manual_seed(1)
    module = Seeing()
    users_trainer(world_size, strategy, max_epochs=2).fit(module)
    return module.seen, module.held_out, module.drawn


def test_samplers_without_a_generator_give_every_sample_to_one_rank():
    """Each rank draws the order of all samples and takes every second one. What steps draw must
    differ all the same."""
    (mine, held_out, my_draws), (theirs, also_held_out, their_draws) = run_ranks(
        sampled, 2, "expert_parallel"
    )
    assert held_out == also_held_out
    for here, there in zip(mine, theirs, strict=True):
        assert sorted(here + there + held_out) == list(range(16))
    assert mine[0] != mine[1] and len(mine) == 2
    assert not {*my_draws} & {*their_draws}


# ---------------------------------------------------------------------- a user's own Trainer


class Gradients(Callback):
    """Keeps every gradient of every step, by step and name."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        self.found |= {f"{trainer.global_step} {name}": g.clone() for name, g in grads.items()}


def own_trainer(
    rank: int,
    world_size: int,
    strategy: Any,
    cls: type[LanguageModel] = LanguageModel,
    accumulate: int = 1,
) -> dict[str, torch.Tensor]:
    """Train with a Trainer that a user has written. Return every gradient of every step, and the
    last norm."""
    config = tiny("position=pos2 optim.lr=0.01", world_size)
    gradients = Gradients()
    module = cls(
        lambda wire: build_model(config, wire), max_steps=2, make_optimizer=partial(adamw, lr=0.01)
    )
    how = {"precision": "64-true", "use_distributed_sampler": False, "limit_val_batches": 0}
    trainer = users_trainer(
        world_size,
        strategy,
        max_steps=2,
        accumulate_grad_batches=accumulate,
        callbacks=[gradients],
        **how,
    )
    trainer.fit(module, build_datamodule(config))
    return gradients.found | {"norm": trainer.callback_metrics["train/grad_norm"]}


def alone(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    return [own_trainer(rank, world_size, strategy) for strategy in ("auto", "expert_parallel")]


def test_a_plain_trainer_is_bit_identical_to_one_with_the_strategy():
    ((plain, with_strategy),) = run_ranks(alone, 1)
    assert plain.keys() == with_strategy.keys() and plain["norm"] > 0
    assert not [
        name for name, value in plain.items() if not torch.equal(value, with_strategy[name])
    ]


class Poisoned(LanguageModel):
    def task_loss(self, batch: dict[str, torch.Tensor]) -> Any:
        nats, *others = super().task_loss(batch)
        return nats * float("nan"), *others


def test_a_plain_trainer_stops_at_a_nan():
    with pytest.raises(RankError, match=r"FloatingPointError: .* first not finite: rank 0: loss"):
        run_ranks(own_trainer, 1, "auto", Poisoned)


def test_an_ep_size_that_does_not_divide_the_number_of_ranks_is_refused():
    with pytest.raises(RankError, match=r"ValueError: ep_size is 3, .* ranks \(2\)"):
        run_ranks(own_trainer, 2, ExpertParallelStrategy(ep_size=3))


class Rows(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader(8)


def by_command_line(rank: int, world_size: int) -> list[tuple[str, int, int]]:
    """Return the strategy, its ep_size and the steps of trainings that LightningCLI starts."""
    common = ["--trainer.accelerator=cpu", f"--trainer.devices={world_size}"]
    common += ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    seen = []
    for strategy in (
        ["--trainer.strategy=expert_parallel"],
        [
            "--trainer.strategy=scmoe.ExpertParallelStrategy",
            "--trainer.strategy.init_args.ep_size=1",
        ],
    ):
        words = ["fit", *common, "--trainer.max_steps=1", *strategy]
        trainer = LightningCLI(Net, Rows, save_config_callback=None, args=words).trainer
        seen.append(
            (type(trainer.strategy).__name__, trainer.strategy.mesh.ep_size, trainer.global_step)
        )
    return seen


def test_lightnings_command_line_starts_it():
    name = "ExpertParallelStrategy"
    assert run_ranks(by_command_line, 2) == [[(name, 2, 1), (name, 1, 1)]] * 2


def threads_after_fits(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return after each training the threads of this process, and the process groups that torch
    has."""
    found = []
    for _ in range(3):
        for dense in ("replicated", "sharded"):
            train(tiny(f"strategy.dense={dense} trainer.max_steps=1", world_size))
        threads = len(list(Path("/proc/self/task").iterdir()))
        found.append((threads, len(dist.distributed_c10d._world.pg_map)))
    return found


def test_trainings_of_one_process_share_their_groups():
    for first, second, third in run_ranks(threads_after_fits, 2):
        assert first == second == third


class Interrupted(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("stopped")


def groups_after_an_error(rank: int, world_size: int) -> bool:
    """Return whether a training after one that has raised has groups of its own."""
    config, meshes = tiny("trainer.max_steps=1", world_size), []
    for callbacks in ([Interrupted()], []):
        trainer = trainer_of(config, callbacks, [])
        with suppress(RuntimeError):
            trainer.fit(RecordingModel(config), build_datamodule(config))
        meshes.append(trainer.strategy.mesh)
    return meshes[0].control_group is not meshes[1].control_group


def test_no_training_uses_the_groups_of_one_that_has_raised():
    assert run_ranks(groups_after_an_error, 1) == [True]
