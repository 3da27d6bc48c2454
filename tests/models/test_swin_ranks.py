"""SwinV2-MoE on two ranks equals one process: losses, gradients, weights after each step, accuracy.

The comparison and its tolerance are those of test_ep_equality.py. The images are scikit-learn's
digits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.engine.ranks import run_ranks
from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model
from scmoe.training.callbacks.data_position import DataPosition
from scmoe.training.modules import ImageClassifier
from tests.support.architectures import SWIN_ON_RANKS, overrides
from tests.support.comparison import TOLERANCE, assemble, assert_same, smallest
from tests.support.parts import Built, build_in_parts, split_wire
from tests.support.resuming import HALF, fit
from tests.support.trainer_of import trainer_of
from tests.support.trainings import Recording, end_groups, train

pytestmark = pytest.mark.ranks

TINY = (
    *(
        "model.family=swin",
        "model.layers=2",
        "model.dim=8",
        "model.heads=1",
        "model.patch_size=1",
        "model.window=2",
    ),
    *(
        "moe.num_experts=4",
        "moe.capacity_factor=null",
        "moe.load_balance_coef=0.1",
        "moe.z_loss_coef=0.01",
    ),
    *("data.name=digits", "data.image_size=16", "data.num_classes=10", "data.global_batch_size=8"),
    *(
        "data.label_smoothing=0.1",
        "data.val_sequences=13",
    ),  # 13: the last batch is filled up on any number of ranks
    *("optim.lr=0.1", "trainer.accelerator=cpu", "trainer.precision=64-true"),
    *("trainer.gradient_clip=null", "trainer.progress=false", "trainer.threads=1"),
)


QUICK = ("dense", "pos2")  # of `make test`; test_ep_equality.py has all with GPT
# SGD keeps nothing between steps: one is enough for the others
THREE_STEPS = ("pos2", "dgmoe-share")


class RecordingClassifier(Recording, ImageClassifier):
    pass


def tiny(words: str, world_size: int = 1) -> Config:
    return load_config(None, [*TINY, f"trainer.devices={world_size}", *overrides(words)])


def train_all(rank: int, world_size: int, cases: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return one record per case, with the metrics of a validation after training."""
    records = {}
    for name, text in cases.items():
        steps = 3 if name.partition(",")[0] in THREE_STEPS else 1
        config = tiny(f"{text} trainer.max_steps={steps}", world_size)
        module = RecordingClassifier(config, num_classes=config.data.num_classes)
        records[name] = train(config, module=module)
        trainer = trainer_of(config, [DataPosition(), ModelCheckpoint(save_top_k=0)], [])
        (metrics,) = trainer.validate(module, build_datamodule(config), verbose=False)
        records[name]["metrics"] = metrics
        end_groups()
    return records


class OnTwo(NamedTuple):
    """built: what a larger model took that is built in parts (test_built_in_parts.py). scale: how
    scales of attention are gathered under bf16-mixed."""

    records: dict[str, dict[str, Any]]
    built: Built
    scale: torch.dtype


def on_two(rank: int, world_size: int, cases: dict[str, str]) -> OnTwo:
    records, wire = train_all(rank, world_size, cases), split_wire(ep_size=1)
    built = build_in_parts(
        tiny("position=pos2 model.layers=8 trainer.precision=32-true", world_size), wire
    )
    model = build_model(tiny("position=pos2 trainer.precision=bf16-mixed", world_size), wire)
    scales: list[torch.dtype] = []
    attention = model.blocks[0].sublayers[0].f.attention
    attention.register_forward_pre_hook(lambda module, _: scales.append(module.logit_scale.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 3, 16, 16))
    return OnTwo(records, built, scales[0])


CASES = {
    name: f"{SWIN_ON_RANKS[name]} strategy.ep_size={1 if name == 'dense' else 2}" for name in QUICK
}
CASES["pos2, two batches"] = "position=pos2 strategy.ep_size=2 schedule.batches_in_flight=2"
CASES["pos2, sharded"] = "position=pos2 strategy.ep_size=1 strategy.dense=sharded"


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    return run_ranks(train_all, 1, {name: SWIN_ON_RANKS[name] for name in QUICK})[0]


@pytest.fixture(scope="module")
def two() -> list[OnTwo]:
    return run_ranks(on_two, 2, CASES)


def assert_equal(records: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    assert_same(records, assemble([expected]))
    for record in records:
        # logged in float32
        assert record["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case, one, two):
    assert_equal([rank.records[case] for rank in two], one[case.partition(",")[0]])


@pytest.mark.faults
def test_two_ranks_equal_one_with_every_other_architecture():
    others = {name: text for name, text in SWIN_ON_RANKS.items() if name not in QUICK}
    (one,) = run_ranks(train_all, 1, others)
    two = run_ranks(
        train_all, 2, {name: f"{text} strategy.ep_size=2" for name, text in others.items()}
    )
    for name in others:
        assert_equal([records[name] for records in two], one[name])


def test_no_rank_holds_more_than_its_part_and_a_block(two):
    for rank in two:
        rank.built.check()


def test_under_bf16_mixed_scales_are_gathered_in_float32(two):
    """In bfloat16 a scale of 10 would be 9.94."""
    assert [rank.scale for rank in two] == [torch.float32] * 2


RANDOM = (
    "data.augment=imagenet data.mixup=0.8 data.cutmix=1 model.drop_path=0.2 moe.noisy=true"
    " strategy.ep_size=2"
)


def uninterrupted_and_resumed(
    rank: int, world_size: int, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    config = tiny(f"{RANDOM} trainer.max_steps=6 optim.lr=0.01", world_size)
    torch.manual_seed(1)
    uninterrupted = fit(config, folder)
    # random numbers must come from the checkpoint and from the position in the data
    torch.manual_seed(2)
    return uninterrupted, fit(config, None, folder / f"step={HALF}.ckpt")


@pytest.mark.faults
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path):
    """Everything random is on: augmentation, mixing, drop path, gate noise."""
    for uninterrupted, resumed in run_ranks(uninterrupted_and_resumed, 2, tmp_path):
        assert not [
            n
            for n, t in uninterrupted["tensors"].items()
            if not torch.equal(t, resumed["tensors"][n])
        ]
        assert uninterrupted["consumed"] == resumed["consumed"] == 6 * 8


def test_no_gradient_is_near_the_tolerance(one):
    for name in QUICK:
        size, gradient = smallest(assemble([one[name]]))
        assert size > 1e6 * TOLERANCE, (name, gradient)
