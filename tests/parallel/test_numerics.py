"""These tests compare a hundred steps on 2, 4 and 8 ranks with one process: SGD and AdamW,
accumulated and clipped (faults 21-25).

    fp64         Loss, gradient norms (2 and infinity) and every gradient at every step, and the
                 final weights, agree within 1e-10; also with recomputed activations, where the
                 routing must be kept, not computed again.
    fp32         One step agrees within 1e-6 in all layouts; a tensor's error is its largest one,
                 relative to the tensor's largest entry. The drift over all steps is compared with
                 that of another order of the same sums in one process.
    bf16-mixed   Training runs and learns, and its first loss is near that of fp64.

Each comparison prints a line of figures; `pytest -s` shows it.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from experiments.engine.ranks import run_ranks
from scmoe.config.fields import Config
from scmoe.moe.router import Router
from scmoe.training.modules import LanguageModel
from tests.support import trainings
from tests.support.comparison import assemble
from tests.support.trainings import RecordingModel, tiny

pytestmark = [
    *(pytest.mark.ranks, pytest.mark.faults),
    pytest.mark.timeout(900),  # the first test of a number of ranks runs all its trainings
]

STEPS, BF16_STEPS, CLIP = 100, 30, 0.5
MODEL = "position=pos2 top_k=2 data.seq_len=8 data.global_batch_size=16 trainer.val_every=1000"
TRAINING = f"{MODEL} trainer.accumulate=2 trainer.gradient_clip={CLIP} trainer.max_steps={STEPS}"
FP64, FP32, BF16 = (f"trainer.precision={name}" for name in ("64-true", "32-true", "bf16-mixed"))
OPTIMIZERS = {"sgd": "optim.lr=0.1", "adamw": "optim.lr=1e-3"}
RECOMPUTED = "trainer.recompute=true"

# Rounding errors of 1e-16 in sums of some thousand terms are 1e-14 a step, and they grow over a
# hundred steps; a missing factor or term gives an error of 1e-3 (test_negative_controls.py).
FP64_TOLERANCE = 1e-10
# Sums of about 1,000 terms with rounding errors of 6e-8, which mostly cancel.
FP32_TOLERANCE = 1e-6
# Drift is random and amplified by the training: two measurements of it differ by a factor.
DRIFT_FACTOR = 10

# name: (ranks, ep_size)
LAYOUTS = {
    "DP 2": (2, 1),
    "EP 2": (2, 2),
    "EP 4": (4, 4),
    "DP 2 x EP 2": (4, 2),
    "EP 8": (8, 8),
    "DP 4 x EP 2": (8, 2),
}
DRIFT_LAYOUTS = RECOMPUTED_LAYOUTS = BF16_LAYOUTS = ("EP 2", "DP 2 x EP 2")


class AdamWModel(RecordingModel):
    """RecordingModel with LanguageModel's own optimizer and schedule."""

    def configure_optimizers(self) -> Any:
        self.before = self.weights()
        return LanguageModel.configure_optimizers(self)


def turned(batch: dict[str, Tensor], places: int) -> dict[str, Tensor]:
    """Return the same sequences in another order, so that sums are done in another order."""
    return {name: t.roll(places, 0) for name, t in batch.items()}


def train(config: Config, optimizer: str, places: int = 0) -> dict[str, Any]:
    """Train on this rank, with sequences rotated by `places`. Return its record in the form that
    `assemble` takes."""
    module = (AdamWModel if optimizer == "adamw" else RecordingModel)(config)
    routed = count_routings(module)
    if places:
        step = module.training_step
        module.training_step = lambda batch, batch_idx: step(turned(batch, places), batch_idx)  # type: ignore[method-assign]
    return trainings.train(config, module) | {
        "outputs": None,
        "routed": routed,
    }  # outputs would take much memory


def count_routings(module: LanguageModel) -> list[str]:
    """Return a list to which each router adds its name when it routes."""
    routed: list[str] = []
    configure = module.configure_model

    def configure_and_count() -> None:
        configure()
        if not routed:
            for name, child in module.named_modules():
                if isinstance(child, Router):
                    child.register_forward_hook(lambda *_, name=name: routed.append(name))

    module.configure_model = configure_and_count  # type: ignore[method-assign]
    return routed


def fit_cases(
    rank: int, world_size: int, cases: dict[str, tuple[str, str, int]]
) -> dict[str, dict[str, Any]]:
    """Train each case on this rank. cases: name -> (words of the config, optimizer, places)."""
    return {name: train(tiny(words, world_size), *how) for name, (words, *how) in cases.items()}


def cases_of(layout: str) -> dict[str, tuple[str, str, int]]:
    """Return the cases of a layout: fp64 and one step in fp32 in all layouts, the rest where it is
    cheap."""
    ep, cases = f"strategy.ep_size={LAYOUTS[layout][1]}", {}
    for optimizer, lr in OPTIMIZERS.items():
        words = f"{TRAINING} {lr} {ep}"
        cases[f"fp64 {optimizer}"] = f"{words} {FP64}", optimizer, 0
        cases[f"fp32 one step {optimizer}"] = f"{words} {FP32} trainer.max_steps=1", optimizer, 0
        if layout in RECOMPUTED_LAYOUTS:
            cases[f"fp64 recomputed {optimizer}"] = f"{words} {FP64} {RECOMPUTED}", optimizer, 0
        if layout in DRIFT_LAYOUTS:
            cases[f"fp32 {optimizer}"] = f"{words} {FP32}", optimizer, 0
        if layout in BF16_LAYOUTS and optimizer == "sgd":
            cases["bf16"] = f"{words} {BF16} trainer.max_steps={BF16_STEPS}", optimizer, 0
    return {f"{layout} {name}": case for name, case in cases.items()}


def one_process_cases() -> dict[str, tuple[str, str, int]]:
    cases = {}
    for optimizer, lr in OPTIMIZERS.items():
        cases[f"fp64 {optimizer}"] = f"{TRAINING} {lr} {FP64}", optimizer, 0
        for places in (0, 1, 3):
            cases[f"fp32 {optimizer} {places}"] = f"{TRAINING} {lr} {FP32}", optimizer, places
        cases[f"fp32 one step {optimizer}"] = (
            f"{TRAINING} {lr} {FP32} trainer.max_steps=1",
            optimizer,
            0,
        )
    return cases


@cache
def one(case: str) -> dict[str, list[Tensor]]:
    return assemble([_all_of_one_process()[case]])


@cache
def _all_of_one_process() -> dict[str, dict[str, Any]]:
    return run_ranks(fit_cases, 1, one_process_cases(), timeout_s=600)[0]


def many(layout: str, what: str) -> list[dict[str, Any]]:
    """Return every rank's record of a case."""
    return [records[f"{layout} {what}"] for records in _all_of_ranks(LAYOUTS[layout][0])]


@cache
def _all_of_ranks(world_size: int) -> list[dict[str, dict[str, Any]]]:
    """Train all layouts of this number of ranks in one start of the ranks."""
    layouts = [layout for layout, (ranks, _) in LAYOUTS.items() if ranks == world_size]
    cases = {name: case for layout in layouts for name, case in cases_of(layout).items()}
    return run_ranks(fit_cases, world_size, cases, timeout_s=900)


# ---------------------------------------------------------------------- comparisons


def errors(
    actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], relative: bool = False
) -> dict[str, float]:
    """Return the largest difference of each kind over all steps. relative: to each tensor's
    largest entry.

    The qkv bias is separate from the other weights, because a key's bias has no influence on a
    softmax. Its gradient is rounding alone, which AdamW divides by its own size: it drifts at the
    learning rate, in one process too.
    """
    worst = {
        "loss": 0.0,
        "norm": 0.0,
        "infinity norm": 0.0,
        "gradient": 0.0,
        "weight": 0.0,
        "qkv bias": 0.0,
    }
    kinds = {"train/loss": "loss", "train/load_balance_loss": "loss", "train/grad_norm": "norm"}
    assert actual.keys() == expected.keys()
    for name in expected:
        kind = kinds.get(name, "gradient" if name.startswith("gradient") else "weight")
        if name.endswith("qkv.bias after"):
            kind = "qkv bias"
        for a, b in zip(actual[name], expected[name], strict=True):
            error = (a.double() - b.double()).abs().max()
            assert error.isfinite(), name
            scale = b.double().abs().max().clamp(min=1e-30) if relative else 1.0
            worst[kind] = max(worst[kind], float(error / scale))
    for a, b in zip(infinity_norms(actual), infinity_norms(expected), strict=True):
        worst["infinity norm"] = max(worst["infinity norm"], abs(a - b) / (b if relative else 1.0))
    return worst


def infinity_norms(values: dict[str, list[Tensor]]) -> list[float]:
    """Return for each step the largest entry of all gradients."""
    gradients = [steps for name, steps in values.items() if name.startswith("gradient")]
    return [max(float(g.abs().max()) for g in step) for step in zip(*gradients, strict=True)]


def say(what: str, **figures: Any) -> None:
    print("\n" + json.dumps({"numerics": what, **figures}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("layout", "what"),
    [
        *((layout, "fp64") for layout in LAYOUTS),
        *((layout, "fp64 recomputed") for layout in RECOMPUTED_LAYOUTS),
    ],
)
def test_fp64_equals_one_process_at_every_step(layout, what, optimizer):
    """The one process keeps all activations. Every batch is routed once in each layer, also where
    activations are recomputed: backward uses the routing of forward."""
    ranks = many(layout, f"{what} {optimizer}")
    found = errors(assemble(ranks), one(f"fp64 {optimizer}"))
    say(f"{layout}, {what}, {optimizer}, {STEPS} steps", **found)
    assert max(found.values()) <= FP64_TOLERANCE
    for rank in ranks:
        layers = set(rank["routed"])
        # two batches a step
        assert layers and all(rank["routed"].count(layer) == 2 * STEPS for layer in layers)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_hundred_steps_train_and_are_clipped(optimizer):
    """Otherwise the comparison would show little."""
    values = one(f"fp64 {optimizer}")
    assert len(values["train/grad_norm"]) == STEPS
    assert sum(norm > CLIP for norm in values["train/grad_norm"]) > STEPS / 2
    assert sum(values["train/loss"][-20:]) < sum(values["train/loss"][:20])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_one_step_from_equal_weights(layout, optimizer):
    """The step has two batches and is clipped. `errors` omits the qkv bias under AdamW."""
    found = errors(
        assemble(many(layout, f"fp32 one step {optimizer}")),
        one(f"fp32 one step {optimizer}"),
        True,
    )
    say(f"{layout}, fp32, {optimizer}, one step, relative to the largest entry", **found)
    if optimizer == "adamw":
        del found["qkv bias"]
    assert max(found.values()) <= FP32_TOLERANCE


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", DRIFT_LAYOUTS)
def test_fp32_drifts_no_more_than_another_order_of_sums(layout, optimizer):
    """A closer bound is not possible: a sum over ranks is another order of the same sum."""
    start = one(f"fp32 {optimizer} 0")
    ours = errors(assemble(many(layout, f"fp32 {optimizer}")), start, relative=True)
    theirs = [errors(one(f"fp32 {optimizer} {places}"), start, relative=True) for places in (1, 3)]
    reordered = {kind: max(found[kind] for found in theirs) for kind in ours}
    say(f"{layout}, fp32 drift, {optimizer}, {STEPS} steps", ours=ours, one_process=reordered)
    assert all(reordered[kind] > 0 for kind in ours)
    assert all(ours[kind] <= DRIFT_FACTOR * reordered[kind] for kind in ours)


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_mixed_runs_and_learns(layout):
    values, expected = assemble(many(layout, "bf16"))["train/loss"], one("fp64 sgd")["train/loss"]
    distance = [float(abs(a - b)) for a, b in zip(values, expected, strict=False)]
    say(
        f"{layout}, bf16-mixed, sgd, {BF16_STEPS} steps",
        loss_at_first=distance[0],
        loss=max(distance),
    )
    assert len(values) == 2 * BF16_STEPS  # one a batch, two batches a step
    assert distance[0] <= 1e-2  # rounding 4e-3, averaged over 64 targets
    assert sum(values[-10:]) < sum(values[:10])
