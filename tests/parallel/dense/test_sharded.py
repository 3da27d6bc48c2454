"""Dense weights that are split over ranks change no result: N processes compute the same as one
(sharded.py). Faults 71 to 75 are what goes wrong with them.

As in test_ep_equality.py, a tiny GPT takes three SGD steps through the real Strategy and Trainer,
in float64, and losses, every gradient, norms, and the weights before and after are within 1e-12 of
one process. The fault suite does so for every architecture, on four and eight ranks.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from experiments.engine.ranks import run_ranks
from scmoe.lightning.stop import EXIT_CODE
from scmoe.parallel.checkpoint import durable
from scmoe.training.assembly.model import build_model_on_meta, build_module
from scmoe.training.assembly.rank_job import dense_estimates, rank_job
from scmoe.training.modules import LanguageModel
from tests.support.cases import ARCHITECTURES, CLIPPED, SLOTS, split
from tests.support.comparison import assemble, assert_no_slot_changes_a_bit, assert_same
from tests.support.failing import failure
from tests.support.faults import damaged, restored, tiny_run
from tests.support.resuming import before_each
from tests.support.trainings import fit, tiny, train, train_at_every_slot, train_cases

pytestmark = pytest.mark.ranks


def kinds_of_sums(rank: int, world_size: int) -> list[str]:
    """Return how FSDP sums the gradients of a training in bfloat16."""
    kinds: set[str] = set()
    decide = _fsdp_collectives._get_gradient_divide_factors

    def noted(*arguments: Any) -> Any:
        decided = decide(*arguments)
        kinds.add(str(decided))
        return decided

    with patch.object(_fsdp_collectives, "_get_gradient_divide_factors", noted):
        train(tiny("strategy.dense=sharded trainer.precision=bf16-mixed", world_size))
    return sorted(kinds)


def test_gradients_are_plain_sums():
    """torch's sum with a factor gives zeros for bfloat16 on NCCL (pytorch issue 190745)."""
    plain = str((None, 1.0, ReduceOp.SUM, ReduceOp.SUM))
    assert run_ranks(kinds_of_sums, 2) == [[plain]] * 2


CASES = {  # case: words of one process, further ones of four
    "clipped, EP 2": (f"position=pos2 top_k=2 {CLIPPED}", split("sharded", 2, 4)),
    "norm, recompute, hybrid, EP 1": (
        f"position=pos3 tap_norm=shared {CLIPPED}",
        f"trainer.recompute=true {split('hybrid', 1, 4)}",
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_equal_one(case):
    text, further = CASES[case]
    (one,) = run_ranks(train_cases, 1, {case: text})
    ranks = run_ranks(train_cases, 4, {case: f"{text} {further}"})
    assert_same([records[case] for records in ranks], assemble([one[case]]))


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("pos3", 2),  # it has the longest window
        *(pytest.param(name, 4, marks=pytest.mark.faults) for name in SLOTS),
    ],
)
def test_no_slot_changes_a_bit(name, world_size):
    schedule, text = SLOTS[name]
    (one,) = run_ranks(train_cases, 1, {name: text})
    cases = {name: (schedule, f"{text} {split('sharded', 2, world_size)}")}
    ranks = run_ranks(train_at_every_slot, world_size, cases)
    assert_no_slot_changes_a_bit(
        [records[name] for records in ranks], schedule, assemble([one[name]])
    )


# ---------------------------------------------------------------------- faults

SHARDED = tiny_run.WAYS["sharded"]


# -------------------------------------------------- every architecture, way and EP degree


SPLIT = {name: text for name, text in ARCHITECTURES.items() if "dgmoe-share" not in name}
ON_FOUR = {  # case: its architecture and words; EP 1, 2 and 4 in turn
    f"{name}, {how}": (name, f"{text} {split(how, (1, 2, 4)[(i + j) % 3], 4)}")
    for j, how in enumerate(("sharded", "hybrid"))
    for i, (name, text) in enumerate(SPLIT.items())
}
ON_EIGHT = {
    name: (name, f"{text} {split(('sharded', 'hybrid')[i // 2 % 2], (2, 4)[i % 2], 8)}")
    for i, (name, text) in enumerate(SPLIT.items())
}
PARTS = {4: 6, 8: 5}  # by number of ranks, each within the time of a test


@pytest.mark.faults
@pytest.mark.parametrize(
    "world_size, part", [(n, part) for n, parts in PARTS.items() for part in range(parts)]
)
def test_every_architecture_equals_one_process(world_size, part):
    every = ON_FOUR if world_size == 4 else ON_EIGHT
    cases = dict(list(every.items())[part :: PARTS[world_size]])
    names = {name for name, _ in cases.values()}
    (one,) = run_ranks(train_cases, 1, {name: ARCHITECTURES[name] for name in names})
    ranks = run_ranks(
        train_cases, world_size, {case: text for case, (_, text) in cases.items()}, timeout_s=280
    )
    for case, (name, _) in cases.items():
        assert_same([rank[case] for rank in ranks], assemble([one[name]]))


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.faults
@pytest.mark.parametrize(
    "layouts",
    [
        [restored.Layout(1, 1), restored.Layout(2, 1, "sharded"), restored.Layout(4, 2, "hybrid")],
        restored.ALL,
    ],
)
def test_a_checkpoint_of_any_layout_is_read_in_any_other(layouts):
    assert restored.reshard(layouts) == {"pairs": len(layouts) ** 2, "equal": len(layouts) ** 2}


@pytest.mark.faults
def test_a_killed_save_of_split_weights_leaves_a_whole_checkpoint():
    found = damaged.kill(points=3, random=3, dense="sharded")
    assert found["killed"] >= found["kill_points"] - 3
    assert (found["lost"], found["mixed"], found["leftovers"]) == (0, 0, 0)


@pytest.mark.faults
def test_a_flipped_bit_is_refused_and_a_resumed_run_is_bit_identical():
    assert damaged.flip(50, dense="sharded") == {"flips": 50, "refused": 50}
    assert restored.resume(2, [2], [0], dense="sharded") == {"compared": 2, "bit_equal": 2}


# ---------------------------------------------------------------------- ranks that fail or stop


class Poisoned(LanguageModel):
    """In step 1 the experts of rank 1 return NaN."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        if batch_idx == 1 and self.wire.mesh.rank == 1:
            experts = self.model.blocks[0].moe.experts
            experts.register_forward_hook(lambda m, a, out: out * float("nan"), prepend=True)
        return super().training_step(batch, batch_idx)


def poisoned(rank: int, world_size: int) -> None:
    config = tiny(f"position=pos2 {' '.join(SHARDED)}", world_size)
    module = build_module(config)
    module.__class__ = Poisoned
    fit(config, module=module)


@pytest.mark.faults
@pytest.mark.representative
def test_a_nan_on_one_rank_stops_all_before_the_update():
    """Each rank searches the origin in its own part of the weights; a collective there would wait
    for ever."""
    said = failure(poisoned, 2, all_fail=True)
    origin = "rank 1: output of model.blocks.0.moe.experts"
    assert (
        said.count(
            "FloatingPointError: gradient norm is nan, no update was made; first not finite:"
            f" {origin}"
        )
        == 2
    )


def stopped(
    rank: int, world_size: int, folder: Path, resume_from: Path | None, victim: int | None
) -> Any:
    """Return the exit code of a run, or its tensors. victim: receives SIGTERM in step 2."""

    def stop(module: LanguageModel, batch_idx: int) -> None:
        if rank == victim and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    words = "trainer.max_steps=5", "strategy.async_checkpoint=true", *SHARDED
    with before_each("training_step", stop):
        try:
            return tiny_run.tensors(
                tiny_run.fit(tiny_run.tiny(world_size, *words), folder, resume_from)
            )
        except SystemExit as end:
            return end.code


@pytest.mark.faults
def test_sigterm_to_one_rank_saves_one_step_and_the_resumed_run_is_bit_identical(tmp_path):
    assert run_ranks(stopped, 2, tmp_path / "stopped", None, 1) == [EXIT_CODE] * 2
    (saved,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert 2 <= durable.verify(saved) < 5
    whole = run_ranks(stopped, 2, tmp_path / "whole", None, None)
    resumed = run_ranks(stopped, 2, tmp_path / "resumed", saved, None)
    assert all(tiny_run.same(a, b) for a, b in zip(resumed, whole, strict=True))


# ---------------------------------------------------------------------- refusals and auto


def fitted_twice(rank: int, world_size: int) -> None:
    config = tiny("position=pos2 trainer.max_steps=1 strategy.dense=sharded", world_size)
    module = build_module(config)
    fit(config, module=module)
    fit(tiny("position=pos2 trainer.max_steps=1", world_size), module=module)


@pytest.mark.faults
def test_a_module_that_is_split_is_not_trained_as_replicated():
    assert "ValueError: dense is replicated, but an earlier run" in failure(fitted_twice, 1)


@pytest.mark.faults
@pytest.mark.representative
def test_auto_of_a_config_counts_activations():
    configs = [tiny(f"strategy.dense=auto data.global_batch_size={n}", 4) for n in (8, 64)]
    few, many = (
        dense_estimates(rank_job(config), build_model_on_meta(config)) for config in configs
    )
    assert list(few) == ["replicated", "sharded"] and all(many[way] > few[way] for way in few)
