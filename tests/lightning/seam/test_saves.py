"""Lightning's ModelCheckpoint keeps the best k and the last of this library's checkpoints, in the
foreground and in parallel with training, and a run resumes from the last. A resumed run keeps the
best as its configuration says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.demos.boring_classes import BoringModel

from experiments.engine.ranks import run_ranks
from scmoe.config.load import load_config
from scmoe.lightning.seam import loops
from scmoe.lightning.seam.saves import LastCheckpoint
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import read_meta
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import build_callbacks, seed_everything
from scmoe.training.callbacks.data_position import DataPosition
from tests.support.faults.tiny_run import same
from tests.support.trainer_of import trainer_of
from tests.support.trainings import tiny, users_trainer

pytestmark = pytest.mark.ranks

SCORES = [3.0, 1.0, 0.0, 2.0]  # of steps 1 to 4


class Score(DataPosition):
    """Logs a score after each step and keeps the step's weights. stop_after: training stops after
    this step."""

    def __init__(self, stop_after: int | None) -> None:
        self.stop_after = stop_after
        self.weights_after: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        step, module = trainer.global_step, trainer.lightning_module
        module.log("score", SCORES[step - 1])
        self.weights_after[step] = weights(module)
        trainer.should_stop = step == self.stop_after


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Run(NamedTuple):
    """best: the best checkpoints that the callback knows, the best first. found: weights at the
    end. tested: for each batch of a test of the best, whether the weights were those of the best
    step."""

    best: list[str]
    found: dict[str, torch.Tensor]
    tested: list[bool]


def fit(
    folder: Path,
    background: bool,
    last: Any,
    resume_from: Any = None,
    stop_after: int | None = None,
    test: bool = False,
) -> Run:
    words = (
        f"strategy.ep_size=2 strategy.async_checkpoint={background} trainer.max_steps={len(SCORES)}"
    )
    config = tiny(f"position=pos2 model.dropout=0.1 {words}", 2)
    seed_everything(config.seed)
    keeping: dict[str, Any] = dict(
        monitor="score", mode="min", save_top_k=2, save_last=last, every_n_train_steps=1
    )
    score, best = Score(stop_after), ModelCheckpoint(folder, "{step}", **keeping)
    trainer, module, data = (
        trainer_of(config, [score, best], []),
        build_module(config),
        build_datamodule(config),
    )
    trainer.limit_val_batches = (
        0  # otherwise Lightning saves the last step in a validation, and there is none
    )
    trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    known = sorted(best.best_k_models, key=lambda path: best.best_k_models[path])
    assert best.best_model_path == known[0]
    found, tested = weights(module), list[bool]()
    if test:
        module.test_step = lambda batch, batch_idx: tested.append(
            same(weights(module), score.weights_after[3])
        )
        trainer.test(module, data, ckpt_path="best", weights_only=True, verbose=False)
    return Run([Path(path).name for path in known], found, tested)


def steps_in(folder: Path) -> dict[str, int]:
    return {path.name: durable.verify(path) for path in folder.iterdir()}


def in_all_ways(
    rank: int, world_size: int, folder: Path, background: bool
) -> tuple[dict[str, Run], dict[str, Any]]:
    """Return the runs by name, and the steps of the checkpoints that they left."""
    runs, left = (
        {"whole": fit(folder / "whole", background, True, test=True)},
        {"whole": steps_in(folder / "whole")},
    )
    runs["linked"], left["linked"] = (
        fit(folder / "linked", background, "link"),
        steps_in(folder / "linked"),
    )
    runs["resumed"] = fit(folder / "whole", background, True, folder / "whole/step=3.ckpt")
    # there is no last: from step 0
    runs["stopped"] = fit(folder / "stopped", background, True, "last", stop_after=2)
    left["stopped"] = steps_in(folder / "stopped")
    runs["from last"] = fit(folder / "stopped", background, True, "last")
    left["from last"] = steps_in(folder / "stopped")
    return runs, left


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.faults  # as under ddp: test_ddp_features.py; with experts: test_remote.py
@pytest.mark.parametrize(
    "background", [pytest.param(False, id="foreground"), pytest.param(True, id="background")]
)
def test_the_best_two_and_the_last_are_kept_and_resumed_from(background, tmp_path):
    (first, left), (second, _) = run_ranks(in_all_ways, 2, tmp_path, background)
    assert left["whole"] == {"step=2.ckpt": 2, "step=3.ckpt": 3, "last.ckpt": 4}
    assert left["linked"] == left["whole"] | {"last.ckpt": 3}, (
        "a link points to the last that was saved"
    )
    assert left["stopped"]["last.ckpt"] == 2 and left["from last"]["last.ckpt"] == len(SCORES)
    for runs in (first, second):
        for name in ("whole", "linked", "resumed"):
            assert runs[name].best == ["step=3.ckpt", "step=2.ckpt"], (
                "the checkpoint holds the best of the first run"
            )
        whole = runs["whole"]
        assert whole.tested and all(whole.tested), "Lightning tests its own best"
        assert not same(whole.found, runs["stopped"].found)
        for name in ("linked", "resumed", "from last"):
            assert same(runs[name].found, whole.found), name


class Validated(BoringModel):
    SCORES = (2.0, 1.0, 3.0, 1.5, 0.5)  # of steps 1 to 5

    def on_validation_epoch_end(self) -> None:
        self.log("val/bits_per_byte", self.SCORES[self.global_step - 1])


def keep_best(
    folder: Path, steps: int, kept: int, resume_from: Path | None
) -> tuple[list[str], list[str]]:
    """Train in one process as a run does. Return the best checkpoints that are known, the best
    first, and all."""
    callbacks: list[Callback] = build_callbacks(
        load_config(None, [f"trainer.save_top_k={kept}"]), folder
    )
    (best,) = (c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
    how = {
        "max_epochs": -1,
        "max_steps": steps,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
    }
    how |= {"num_sanity_val_steps": 0, "limit_val_batches": 1, "enable_checkpointing": True}
    trainer = users_trainer(
        1, "auto", callbacks=[best, LastCheckpoint(folder / "checkpoints", 1)], **how
    )
    trainer.fit(Validated(), ckpt_path=resume_from, weights_only=True)
    known = sorted(best.best_k_models, key=best.best_k_models.__getitem__)
    assert [best.best_model_path, best.kth_best_model_path] == [known[0], known[-1]]
    return [Path(path).name for path in known], sorted(
        path.name for path in (folder / "checkpoints").iterdir()
    )


def test_a_resumed_run_that_was_moved_keeps_as_many_of_the_best_as_configured(tmp_path):
    known, _ = keep_best(tmp_path / "there", 3, 3, None)
    assert known == ["best-step=2.ckpt", "best-step=1.ckpt", "best-step=3.ckpt"]
    here = (tmp_path / "there").rename(tmp_path / "here")
    (here / "checkpoints/best-step=1.ckpt").unlink()
    known, files = keep_best(here, 4, 1, here / "checkpoints/best-step=3.ckpt")
    assert known == ["best-step=2.ckpt"] and files == [
        "best-step=2.ckpt",
        "best-step=3.ckpt",
        "step=4.ckpt",
    ]
    known, files = keep_best(here, 5, 1, here / "checkpoints/step=4.ckpt")
    assert known == ["best-step=5.ckpt"] and files == ["best-step=5.ckpt", "step=5.ckpt"]


class Killed(Exception):
    """Ends a training where a kill would."""


SCORE_OF_STEP = {2: 1.0, 4: 2.0, 6: 3.0, 8: 0.5}  # lower is better


class Judged(BoringModel):
    """Validates after every second step, and is killed in or after the validation of one.

    known: for each validated step, what the callbacks then know of the best and of patience, and
    for each step of training what it has drawn.
    """

    def __init__(self, killed: str, known: dict[Any, Any]) -> None:
        super().__init__()
        self.killed, self.known = killed, known

    def on_validation_epoch_end(self) -> None:
        if self.killed == f"in {self.global_step}":
            raise Killed
        self.log("val/bits_per_byte", SCORE_OF_STEP[self.global_step])

    def on_validation_end(self) -> None:
        best, patience = self.trainer.checkpoint_callback, self.trainer.early_stopping_callback
        self.known[self.global_step] = (
            patience.wait_count,
            [Path(path).name for path in best.best_k_models],
        )

    def training_step(self, *arguments: Any) -> Any:
        self.known["drawn", self.global_step] = torch.rand(1).item()
        return super().training_step(*arguments)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.killed == f"after {self.global_step}":
            raise Killed


def judged(
    folder: Path, killed: str = "never", known: dict[Any, Any] | None = None, **further: Any
) -> Any:
    """Train from the newest checkpoint in the folder. Return what is known, and all checkpoints.

    further: arguments of the Trainer."""
    known = {} if known is None else known
    words = ["trainer.early_stopping=9", "trainer.checkpoint_every=2"]
    callbacks = [
        c
        for c in build_callbacks(load_config(None, words), folder)
        if isinstance(c, ModelCheckpoint | EarlyStopping)
    ]
    how = {"max_epochs": -1, "max_steps": 8, "val_check_interval": 2, "limit_val_batches": 1}
    how |= {"check_val_every_n_epoch": None, "num_sanity_val_steps": 0, **further}
    strategy = ExpertParallelStrategy()
    trainer = users_trainer(1, strategy, callbacks=callbacks, enable_checkpointing=True, **how)
    saved = (folder / "checkpoints").glob("*.ckpt")
    newest = max(saved, key=lambda path: (path.stem.rpartition("=")[2], path.name), default=None)
    torch.manual_seed(0 if newest is None else 1)
    trainer.fit(Judged(killed, known), ckpt_path=newest, weights_only=True)
    return known, sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "kills", [["in 4"], ["after 4"], ["after 6"], ["in 8"], ["in 2", "after 2"]], ids=", ".join
)
def test_a_run_that_is_killed_in_or_after_a_validation_loses_nothing(kills, tmp_path):
    whole = judged(tmp_path / "whole")
    assert whole[0][8] == (0, ["best-step=8.ckpt"]) and whole[0][6][0] == 2
    known = dict[Any, Any]()
    for killed in kills:
        with pytest.raises(Killed):
            judged(tmp_path / "cut", killed, known)
        step = killed.split()[1]
        saved = {f"step={step}.ckpt", f"best-step={step}.ckpt"}
        assert saved & {path.name for path in (tmp_path / "cut/checkpoints").iterdir()}
    assert judged(tmp_path / "cut", known=known) == whole


@pytest.mark.parametrize("change", [{"limit_val_batches": 0}, {"val_check_interval": 3}], ids=str)
def test_a_validation_that_is_left_is_dropped_where_it_is_not_due_any_more(change, tmp_path):
    """The training has all its steps then, and takes no further one."""
    with pytest.raises(Killed):
        judged(tmp_path, "in 8")
    known, files = judged(tmp_path, **change)
    assert known == {} and files == ["best-step=2.ckpt", "step=8.ckpt"]
    known, _ = judged(tmp_path, max_steps=9, limit_val_batches=0)
    assert known.keys() == {("drawn", 8)}
    assert not loops.validation_is_left(read_meta(tmp_path / "checkpoints/step=9.ckpt"))


def early_stopping(patience: int) -> EarlyStopping:
    config = load_config(None, [f"trainer.early_stopping={patience}"])
    return next(c for c in build_callbacks(config, None) if isinstance(c, EarlyStopping))


def test_a_resumed_run_stops_early_with_the_patience_of_its_configuration():
    three, ten = early_stopping(3), early_stopping(10)
    three.wait_count = 3
    three.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
    ten.load_state_dict(three.state_dict())
    assert (ten.patience, ten.wait_count) == (10, 3)
    assert ten.stopping_reason == EarlyStoppingReason.NOT_STOPPED, "of an earlier part of the run"
