"""Fault 12: SIGTERM during validation stops a run there, not at the next training step, and the
resumed run is bit-identical.

SIGTERM during training, and its exit code, are in tests/training/run/test_stop_smoke.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.engine.ranks import run_ranks
from scmoe.lightning.stop import EXIT_CODE
from scmoe.parallel.checkpoint import durable
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import build_callbacks, seed_everything
from scmoe.training.modules import LanguageModel
from tests.support.faults import tiny_run
from tests.support.resuming import before_each, exit_code
from tests.support.trainer_of import trainer_of

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

BATCHES, AT_BATCH = 10, 3  # of a validation; the batch in which a rank receives SIGTERM
CONFIG = (
    *("trainer.max_steps=4", "trainer.val_every=2", "trainer.accumulate=2"),
    f"trainer.checkpoint_every={tiny_run.NEVER}",
    f"data.val_sequences={BATCHES * 8}",  # 16 a step, 8 a batch
)


def run(
    rank: int,
    world_size: int,
    folder: Path,
    resume_from: Path | None,
    victim: int | None,
    number: int = signal.SIGTERM,
) -> tuple[Any, list[int], dict[str, Tensor]]:
    """Return a run's exit code, validation batches and final tensors. victim: the rank that
    receives the signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    validated: list[int] = []
    tensors: dict[str, Tensor] = {}

    def note(module: LanguageModel, batch_idx: int) -> None:
        validated.append(batch_idx)
        if rank == victim and batch_idx == AT_BATCH:
            os.kill(os.getpid(), number)

    def fit() -> None:
        trainer = tiny_run.fit(tiny_run.tiny(world_size, *CONFIG), folder, resume_from)
        tensors.update({name: t.clone() for name, t in tiny_run.tensors(trainer).items()})

    with before_each("validation_step", note):
        return exit_code(fit), validated, tensors


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.representative)])
def test_sigterm_during_validation_stops_the_run_there(victim, tmp_path):
    ends = run_ranks(run, 2, tmp_path / "stopped", None, victim)
    assert [code for code, _, _ in ends] == [EXIT_CODE] * 2
    assert ends[0][1] == ends[1][1], "all ranks stop at the same batch"
    assert AT_BATCH < len(ends[0][1]) < BATCHES, "validation did not finish"
    (saved,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert (saved.name, durable.verify(saved)) == ("step=2.ckpt", 2)

    uninterrupted = run_ranks(run, 2, tmp_path / "uninterrupted", None, None)
    resumed = run_ranks(run, 2, tmp_path / "resumed", saved, None)
    whole = list(range(BATCHES))
    for (_, validated, tensors), (_, validated_uninterrupted, expected) in zip(
        resumed, uninterrupted, strict=True
    ):
        assert validated == validated_uninterrupted == whole * 2, (
            "the stopped validation is repeated"
        )
        assert tiny_run.same(tensors, expected)


@pytest.mark.representative
def test_ctrl_c_stops_the_run_as_sigterm_does(tmp_path):
    ends = run_ranks(run, 2, tmp_path, None, 1, signal.SIGINT)
    assert [code for code, _, _ in ends] == [EXIT_CODE, 128 + signal.SIGINT], (
        "each rank by the signal that it received"
    )
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert (saved.name, durable.verify(saved)) == ("step=2.ckpt", 2)


def validations(
    rank: int, world_size: int, folder: Path, resume_from: Path | None, stop_at: int | None
) -> tuple[Any, list[int]]:
    """Return a run's exit code, and the steps after which it validated. stop_at: rank 1 receives
    SIGTERM in it."""
    steps: list[int] = []

    def stop(module: LanguageModel, batch_idx: int) -> None:
        if rank == 1 and module.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def note(module: LanguageModel, batch_idx: int) -> None:
        if batch_idx == 0:
            steps.append(module.global_step)

    config = tiny_run.tiny(world_size, *NINE, *CONFIG[3:])
    with before_each("training_step", stop), before_each("validation_step", note):
        return exit_code(lambda: tiny_run.fit(config, folder, resume_from)), steps


NINE = ("trainer.max_steps=9", "trainer.val_every=3")


@pytest.mark.representative
def test_a_resumed_run_validates_after_the_same_steps(tmp_path):
    """Lightning counts the batch before which a run was stopped, and would validate one step too
    early."""
    assert run_ranks(validations, 2, tmp_path, None, 3) == [(EXIT_CODE, [3])] * 2
    (saved,) = (tmp_path / "checkpoints").glob("step=*.ckpt")
    assert saved.name in ("step=4.ckpt", "step=5.ckpt")
    assert run_ranks(validations, 2, tmp_path / "resumed", saved, None) == [(None, [6, 9])] * 2


SCORES = {2: 3.0, 4: 1.0, 6: 2.0}  # step -> score of the validation after it; lower is better
BEST = (
    "trainer.max_steps=6",
    "trainer.val_every=2",
    "trainer.accumulate=2",
    f"data.val_sequences={BATCHES * 8}",
)


def keep_best(
    rank: int, world_size: int, folder: Path, resume_from: Path | None, stop_at: int | None
) -> tuple[Any, dict[str, float], str, str, str]:
    """Return a run's exit code and what its ModelCheckpoint knows: the scores of the checkpoints
    that it keeps, the best one, the last one, and the worst that it keeps. stop_at: rank 1 receives
    SIGTERM in this step's validation.
    """
    best = ModelCheckpoint(folder, "best-{step}", monitor="score", save_top_k=2, save_last=True)

    def note(module: LanguageModel, batch_idx: int) -> None:
        if rank == 1 and module.global_step == stop_at and batch_idx == AT_BATCH:
            os.kill(os.getpid(), signal.SIGTERM)
        module.log("score", SCORES[module.global_step])

    config = tiny_run.tiny(world_size, *BEST, f"trainer.checkpoint_every={tiny_run.NEVER}")
    seed_everything(config.seed)
    trainer = trainer_of(config, [*build_callbacks(config, folder)[:1], best], [])
    module, data = build_module(config), build_datamodule(config)
    with before_each("validation_step", note):
        code = exit_code(
            lambda: trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
        )
    scores = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
    paths = best.best_model_path, best.last_model_path, best.kth_best_model_path
    return code, scores, *(Path(path).name for path in paths)  # type: ignore[return-value]


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_stop_during_validation_loses_no_best_checkpoint(stop_at, tmp_path):
    """This holds for the earlier best one, and for the one that the repeated validation finds to be
    the best."""
    uninterrupted, folder = (
        run_ranks(keep_best, 2, tmp_path / "uninterrupted", None, None),
        tmp_path / "stopped",
    )
    assert [*uninterrupted[0][1]] == ["best-step=4.ckpt", "best-step=6.ckpt"]

    stopped = run_ranks(keep_best, 2, folder, None, stop_at)
    before = {path.name: durable.verify(path) for path in folder.iterdir()}
    done = {"best-step=2.ckpt": 2, "last.ckpt": 2} if stop_at == 4 else {}
    assert before == {f"step={stop_at}.ckpt": stop_at, **done}
    for code, scores, *_ in stopped:
        assert (code, [*scores]) == (EXIT_CODE, [name for name in done if name != "last.ckpt"])

    resumed = run_ranks(keep_best, 2, folder, folder / f"step={stop_at}.ckpt", None)
    assert resumed == uninterrupted
    after = {path.name: durable.verify(path) for path in folder.iterdir()}
    assert after == {
        f"step={stop_at}.ckpt": stop_at,
        "best-step=4.ckpt": 4,
        "best-step=6.ckpt": 6,
        "last.ckpt": 6,
    }


def uneven(rank: int, world_size: int, folder: Path) -> tuple[Any, int]:
    """Rank 1 has one validation batch less, and receives SIGTERM at its last one. Every rank has
    all experts, so that nothing else keeps ranks in step."""
    config = tiny_run.tiny(world_size, *CONFIG, "strategy.ep_size=1")
    data = build_datamodule(config)
    loader, validated = data.val_dataloader, 0
    data.val_dataloader = lambda: DataLoader(list(loader())[: BATCHES - rank], batch_size=None)  # type: ignore

    def note(module: LanguageModel, batch_idx: int) -> None:
        nonlocal validated
        validated += 1
        if rank == 1 and batch_idx == BATCHES - 2:
            os.kill(os.getpid(), signal.SIGTERM)

    seed_everything(config.seed)
    trainer = trainer_of(config, build_callbacks(config, folder), [])
    with before_each("validation_step", note):
        code = exit_code(lambda: trainer.fit(build_module(config), data))
    return code, validated


def test_ranks_with_different_numbers_of_validation_batches_agree_too(tmp_path):
    """Ranks ask as often as all of them can, then at the next training step; that answer is read
    one step later."""
    assert run_ranks(uneven, 2, tmp_path) == [(EXIT_CODE, BATCHES), (EXIT_CODE, BATCHES - 1)]
    (saved,) = (tmp_path / "checkpoints").glob("step=*")
    assert durable.verify(saved) == 3
