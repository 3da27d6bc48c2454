"""Faults 17, 20-26 and 28: transfers, gradients, seeds and routing of experts on two and four ranks.

Each test has the number of its fault; tests/distributed/test_ep_equality.py covers all architectures, slots and
layouts. The weights are those of that file, where every term has an effect. The tolerance of 1e-12 in float64 allows
the same sums in another order.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from scmoe.experiments.engine.ranks import run_ranks
from scmoe.moe.router import Router
from scmoe.parallel.wire.all_to_all import Transfer
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.trainer import build_trainer
from scmoe.training.callbacks.bookkeeping import DataPosition
from scmoe.training.callbacks.expert_load import PATIENCE, ExpertLoad
from tests.support.comparison import assemble, difference
from tests.support.trainings import RecordingModel, tiny, train

pytestmark = [pytest.mark.dist, pytest.mark.faults]

TOLERANCE = 1e-12
MODEL = "position=pos2 top_k=2"
CLIP = 0.25
LAYOUTS = {"DP 2": (2, 1), "EP 2": (2, 2), "EP 4": (4, 4), "DP 2 x EP 2": (4, 2)}  # ranks, EP degree

# ---------------------------------------------------------------------- 17: a buffer in flight

POISON = 7.0


class LazyWork:
    """This transfer reads the sender's buffer at the wait and not before, and keeps neither buffer alive."""

    def __init__(self, target: Tensor, source: Tensor) -> None:
        self.target, self.source = weakref.ref(target), weakref.ref(source)

    @torch.no_grad()
    def wait(self) -> None:
        gc.collect()
        source, target = self.source(), self.target()
        assert source is not None and target is not None, "a buffer was freed before the wait"
        target.copy_(source)


def lazily(rows: Tensor, traffic: None) -> tuple[Tensor, LazyWork]:
    target = torch.full_like(rows, POISON)
    return target, LazyWork(target, rows)


@pytest.mark.representative
def test_buffers_are_held_until_the_wait_and_no_longer():
    """This holds in forward and backward. The caller drops its rows at once, and new tensors take the free memory."""
    x = torch.randn(8, 4, requires_grad=True)
    transfer = Transfer(lazily).start(2 * x)
    sources = [weakref.ref(transfer.source)]
    held = [torch.full((8, 4), POISON) for _ in range(16)]
    received = transfer.wait()
    assert torch.equal(received, 2 * x)
    gc.collect()
    assert transfer.source is None and sources[0]() is None

    (received * torch.arange(4.0)).sum().backward()
    assert torch.equal(x.grad, (2 * torch.arange(4.0)).expand(8, 4))
    assert transfer.source is None and len(held) == 16


# ---------------------------------------------------------------------- 20-25: equal to one process


class AuxOnly(RecordingModel):
    """This model learns from the load-balance loss and the z loss alone."""

    def task_loss(self, batch: dict[str, Tensor]) -> Any:
        nats, targets, stats = super().task_loss(batch)
        return 0.0 * nats, targets, stats


def train_all(rank: int, world_size: int, ep_size: int) -> dict[str, dict[str, Any]]:
    text = f"{MODEL} strategy.ep_size={ep_size}"
    clipped = f"{text} trainer.accumulate=2 trainer.gradient_clip={CLIP}"
    task_alone = tiny(f"{text} load_balance_coef=0 z_loss_coef=0", world_size)
    return {
        "clipped": train(tiny(clipped, world_size)),
        "starved": train(tiny(text, world_size), starved=True),
        "task": train(task_alone),
        "aux": train(tiny(text, world_size), module=AuxOnly(tiny(text, world_size))),
    }


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, list[Tensor]]]:
    (records,) = run_ranks(train_all, 1, 1)
    return {name: assemble([record]) for name, record in records.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def many(request) -> dict[str, list[dict[str, Any]]]:
    world_size, ep_size = LAYOUTS[request.param]
    ranks = run_ranks(train_all, world_size, ep_size)
    return {name: [records[name] for records in ranks] for name in ranks[0]}


def only(values: dict[str, list[Tensor]], *words: str) -> dict[str, list[Tensor]]:
    """Returns the gradients of parameters that have one of these words in their names."""
    found = {k: v for k, v in values.items() if k.startswith("gradient of ") and any(word in k for word in words)}
    assert found
    return found


def assert_equal(actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    error, where = difference(actual, expected)
    assert error <= TOLERANCE, f"{where}: {error:.1e}"
    smallest = min(float(g.abs().max()) for steps in expected.values() for g in steps)
    assert smallest > 1e6 * TOLERANCE, "a gradient is too small for this comparison"


def test_experts_without_a_token_have_zero_gradients(many, one):
    """Half of all experts have no token. With EP 2 and EP 4, some ranks compute on no rows."""
    ranks = many["starved"]
    error, where = difference(assemble(ranks), one["starved"])
    assert error <= TOLERANCE, where
    for steps in only(assemble(ranks), "experts").values():
        for step in steps:
            busy = [bool(expert.abs().max() > 0) for expert in step]
            assert any(busy[:4]) and not any(busy[4:])


def test_expert_gradients_have_the_scale_of_one_process(many, one):
    assert_equal(only(assemble(many["task"]), "experts"), only(one["task"], "experts"))


def test_one_global_norm_clips_all_ranks_equally(many, one):
    """The 2-norm, which clips, all gradients and the weights after the update are equal to those of one process."""
    ours, theirs = assemble(many["clipped"]), one["clipped"]
    assert len({tuple(map(float, rank["logged"]["train/grad_norm"])) for rank in many["clipped"]}) == 1, "norms differ"
    assert min(theirs["train/grad_norm"]) > CLIP, "a step was not clipped"
    for a, b in zip(ours["train/grad_norm"], theirs["train/grad_norm"], strict=True):
        assert abs(a - b) <= TOLERANCE
    for values in zip(*only(ours, "").values(), strict=True), zip(*only(theirs, "").values(), strict=True):
        assert all(max(float(g.abs().max()) for g in step) > 0 for step in values)
    assert_equal(only(ours, ""), only(theirs, ""))
    after = [{k: v for k, v in values.items() if k.endswith(" after")} for values in (ours, theirs)]
    assert difference(*after)[0] <= TOLERANCE


def test_the_router_learns_from_the_task_as_in_one_process(many, one):
    assert_equal(only(assemble(many["task"]), "router"), only(one["task"], "router"))


def test_the_auxiliary_losses_do_not_depend_on_the_ranks(many, one):
    """They are trained alone: next to the task's gradient a wrong factor would be small."""
    assert_equal(only(assemble(many["aux"]), "router"), only(one["aux"], "router"))
    assert difference(assemble(many["aux"]), one["aux"])[0] <= TOLERANCE


def test_drawn_weights_do_not_depend_on_the_ranks(many, one):
    """They are bit-identical, and no two experts are equal. `assemble` compares the replicas."""
    drawn = {k: v for k, v in assemble(many["task"]).items() if k.endswith(" drawn")}
    assert difference(drawn, {k: one["task"][k] for k in drawn})[0] == 0.0
    for name, (weights,) in drawn.items():
        if "experts.w" in name:
            assert len(weights.flatten(1).unique(dim=0)) == len(weights) == 8, name


# ---------------------------------------------------------------------- 26, 28: a router with extreme logits


def rig(module: Any, logit: float) -> None:
    """For every token, expert 0 gets this logit, the last expert its negative, the others 0."""
    module.configure_model()
    for block in module.model.blocks:
        with torch.no_grad():
            block.tap_norm.weight.zero_()
            block.tap_norm.bias.zero_()
            block.tap_norm.bias[0] = 1.0
            block.moe.router.gate.weight.zero_()
            block.moe.router.gate.weight[0, 0], block.moe.router.gate.weight[-1, 0] = logit, -logit


class Rigged(RecordingModel):
    logit = 0.0

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            rig(self, self.logit)


def collapse(rank: int, world_size: int, logit: float) -> tuple[dict[str, float], list[str]]:
    """Returns the metrics of the last step, and the warnings of a collapse."""
    steps = PATIENCE + 1
    words = f"position=pos2 strategy.ep_size=2 trainer.max_steps={steps} trainer.log_every=1 optim.lr=1e-6"
    config = tiny(words, world_size)
    module = Rigged(config)
    module.logit = logit
    trainer = build_trainer(config, [DataPosition(), ExpertLoad()], [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, build_datamodule(config))
    said = [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "moe/" in name}, said


def test_a_collapsed_router_is_measured_and_named():
    (metrics, said), (others, silent) = run_ranks(collapse, 2, 20.0)
    assert metrics == others, "metrics count the tokens of all ranks"
    assert (metrics["moe/load_max"], metrics["moe/load_entropy"], metrics["moe/dead_experts"]) == (8.0, 0.0, 7.0)
    assert [line.partition(" gets ")[0] for line in said] == ["MoE layer 0: the router has collapsed, expert 0"]
    assert not silent, "only rank 0 warns"


def huge_logits(rank: int, world_size: int) -> tuple[list[tuple[torch.dtype, float]], list[float], bool]:
    """Trains with logits of +-7e4, which float16 cannot hold.

    Returns the types and sizes of the logits, the losses, and whether all gradients are finite.
    """
    words = "position=pos2 top_k=2 strategy.ep_size=2 trainer.precision=bf16-mixed z_loss_coef=0"
    config, seen = tiny(words, world_size), []
    module = Rigged(config)
    module.logit = 7e4
    configure = module.configure_model

    def configure_and_watch() -> None:
        configure()
        for child in module.modules():
            if isinstance(child, Router) and not child._forward_hooks:
                child.register_forward_hook(
                    lambda _, args, out: seen.append((out.logits_TE.dtype, float(out.logits_TE.abs().max())))
                )

    module.configure_model = configure_and_watch  # type: ignore[method-assign]
    record = train(config, module=module)
    finite = all(bool(g.isfinite().all()) for step in record["gradients"] for g in step.values())
    return seen, [float(loss) for loss in record["logged"]["train/loss"]], finite


def test_huge_logits_are_float32_under_bf16():
    for seen, losses, finite in run_ranks(huge_logits, 2):
        assert {dtype for dtype, _ in seen} == {torch.float32}
        assert seen[0][1] == pytest.approx(7e4, rel=1e-4), "in bf16 the logit would be 70144 or 69632"
        assert len(losses) == 3 and all(0 < loss < 100 for loss in losses) and finite
