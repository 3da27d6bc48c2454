"""Faults 17, 20-26 and 28-30: transfers, gradients, seeds and routing of experts on two and four ranks.

Each alone and under its number; all architectures, slots and layouts: tests/distributed/test_ep_equality.py. Weights
are those of that file, at which every term counts; 1e-12 in float64 is for the same sums in another order.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.moe.activation import Activation
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.all_to_all import Transfer
from scmoe.parallel.dispatcher import AllToAllDispatcher
from scmoe.testbed.ranks import run_ranks
from scmoe.tokens import Routing
from scmoe.training.build.data import build_datamodule
from scmoe.training.build.trainer import build_trainer
from scmoe.training.callbacks.collapse import PATIENCE
from scmoe.training.callbacks.data_position import DataPosition
from scmoe.training.callbacks.expert_load import ExpertLoad
from tests.support.comparison import assemble, difference
from tests.support.models import assert_close, randomise
from tests.support.trainings import RecordingModel, tiny, train

pytestmark = [pytest.mark.dist, pytest.mark.faults]

TOLERANCE = 1e-12
MODEL = "position=pos2 top_k=2"
CLIP = 0.25
LAYOUTS = {"DP 2": (2, 1), "EP 2": (2, 2), "EP 4": (4, 4), "DP 2 x EP 2": (4, 2)}  # ranks, EP degree

# ---------------------------------------------------------------------- 17: a buffer in flight

POISON = 7.0


class LazyWork:
    """Reads the sender's buffer when it is awaited, not before, and keeps neither buffer alive."""

    def __init__(self, target: Tensor, source: Tensor) -> None:
        self.target, self.source = weakref.ref(target), weakref.ref(source)

    @torch.no_grad()
    def wait(self) -> None:
        gc.collect()
        source, target = self.source(), self.target()
        assert source is not None and target is not None, "a buffer was freed before the wait"
        target.copy_(source)


def lazily(rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, LazyWork]:
    target = torch.full_like(rows, POISON)
    return target, LazyWork(target, rows)


@pytest.mark.representative
def test_17_buffers_are_held_until_the_wait_and_no_longer():
    """Forward and backward; the caller lets go of its rows at once, and new tensors take what memory is free."""
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


# ---------------------------------------------------------------------- 20-25: as one process has them


class AuxOnly(RecordingModel):
    """Learns from the load-balance and z loss alone."""

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
    """Gradients of parameters that have one of these words in their names."""
    found = {k: v for k, v in values.items() if k.startswith("gradient of ") and any(word in k for word in words)}
    assert found
    return found


def assert_equal(actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> None:
    error, where = difference(actual, expected)
    assert error <= TOLERANCE, f"{where}: {error:.1e}"
    smallest = min(float(g.abs().max()) for steps in expected.values() for g in steps)
    assert smallest > 1e6 * TOLERANCE, "what is so small shows nothing"


def test_20_experts_without_a_token_have_zero_gradients(many, one):
    """Half of all experts; under EP 2 and more these are ranks that compute on no rows at all."""
    ranks = many["starved"]
    error, where = difference(assemble(ranks), one["starved"])
    assert error <= TOLERANCE, where
    for steps in only(assemble(ranks), "experts").values():
        for step in steps:
            busy = [bool(expert.abs().max() > 0) for expert in step]
            assert any(busy[:4]) and not any(busy[4:])


def test_21_expert_gradients_have_the_scale_of_one_process(many, one):
    assert_equal(only(assemble(many["task"]), "experts"), only(one["task"], "experts"))


def test_22_one_global_norm_clips_all_ranks_alike(many, one):
    """The 2-norm, which clips, and the largest entry of all gradients; then the weights that follow from it."""
    ours, theirs = assemble(many["clipped"]), one["clipped"]
    assert len({tuple(map(float, rank["logged"]["train/grad_norm"])) for rank in many["clipped"]}) == 1, "to the bit"
    assert min(theirs["train/grad_norm"]) > CLIP, "nothing was clipped"
    for a, b in zip(ours["train/grad_norm"], theirs["train/grad_norm"], strict=True):
        assert abs(a - b) <= TOLERANCE
    for values in zip(*only(ours, "").values(), strict=True), zip(*only(theirs, "").values(), strict=True):
        assert all(max(float(g.abs().max()) for g in step) > 0 for step in values)
    assert_equal(only(ours, ""), only(theirs, ""))
    after = [{k: v for k, v in values.items() if k.endswith(" after")} for values in (ours, theirs)]
    assert difference(*after)[0] <= TOLERANCE


def test_23_the_router_learns_from_the_task_as_in_one_process(many, one):
    assert_equal(only(assemble(many["task"]), "router"), only(one["task"], "router"))


def test_24_the_auxiliary_losses_do_not_depend_on_the_ranks(many, one):
    """Alone: beside the task's gradient a wrong factor would be small."""
    assert_equal(only(assemble(many["aux"]), "router"), only(one["aux"], "router"))
    assert difference(assemble(many["aux"]), one["aux"])[0] <= TOLERANCE


def test_25_weights_are_drawn_alike_whatever_the_ranks(many, one):
    """To the bit; no two experts are the same. `assemble` compares the replicas."""
    drawn = {k: v for k, v in assemble(many["task"]).items() if k.endswith(" drawn")}
    assert difference(drawn, {k: one["task"][k] for k in drawn})[0] == 0.0
    for name, (weights,) in drawn.items():
        if "experts.w" in name:
            assert len(weights.flatten(1).unique(dim=0)) == len(weights) == 8, name


# ---------------------------------------------------------------------- 26, 28: a router out of its senses


def rig(module: Any, logit: float) -> None:
    """Whatever the token, expert 0 has this logit, the last one its negative, the others 0."""
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
    """Metrics of the last step, and what was warned of."""
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


def test_26_a_collapsed_router_is_measured_and_named():
    (metrics, said), (others, silent) = run_ranks(collapse, 2, 20.0)
    assert metrics == others, "of all ranks' tokens"
    assert (metrics["moe/load_max"], metrics["moe/load_entropy"], metrics["moe/dead_experts"]) == (8.0, 0.0, 7.0)
    assert [line.partition(" gets ")[0] for line in said] == ["MoE layer 1 of 1: the router has collapsed, expert 0"]
    assert not silent, "rank 0 alone speaks"


def huge_logits(rank: int, world_size: int) -> tuple[list[tuple[torch.dtype, float]], list[float], bool]:
    """Logits of +-7e4, beyond float16: their types and sizes, the losses, and whether all gradients are finite."""
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


def test_28_huge_logits_are_float32_under_bf16():
    for seen, losses, finite in run_ranks(huge_logits, 2):
        assert {dtype for dtype, _ in seen} == {torch.float32}
        assert seen[0][1] == pytest.approx(7e4, rel=1e-4), "in bf16 it would be 70144 or 69632"
        assert len(losses) == 3 and all(0 < loss < 100 for loss in losses) and finite


# ---------------------------------------------------------------------- 29: more copies than slots


def sweep(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    records = {}
    for factor in ("0.5", "1.0", "1.5", "8.0", "null"):
        config = tiny(f"{MODEL} strategy.ep_size=2 trainer.log_every=1 capacity_factor={factor}", world_size)
        module = RecordingModel(config)
        load, shares = ExpertLoad(), []
        log_dict = module.log_dict
        module.log_dict = lambda values, *a, **k: (  # type: ignore[method-assign]
            shares.append(float(values["moe/drop_share"])),  # noqa: B023
            log_dict(values, *a, **k),  # noqa: B023
        )
        trainer = build_trainer(config, [DataPosition(), load], [])
        trainer.fit(module, build_datamodule(config))
        records[factor] = {"shares": shares, "weights": module.weights()}
    return records


def test_29_what_is_dropped_is_logged_and_ample_room_is_dropless():
    """1e-12 here: products over rows that are filled up with empty slots may sum in another order. To the bit below."""
    ranks = run_ranks(sweep, 2)
    for records in ranks:
        first = [records[factor]["shares"][0] for factor in ("0.5", "1.0", "1.5", "8.0", "null")]
        assert first == sorted(first, reverse=True) and first[0] >= 0.5 - 1e-6 and first[1] > 0
        assert records["8.0"]["shares"] == records["null"]["shares"] == [0.0, 0.0, 0.0]
        for name, weight in records["8.0"]["weights"].items():
            assert_close(weight, records["null"]["weights"][name], TOLERANCE, name)
    assert ranks[0]["1.0"]["shares"] == ranks[1]["1.0"]["shares"], "of all ranks' copies"


DIM, FFN, EXPERTS, TOKENS = 16, 24, 8, 12  # features, those between an expert's two products; tokens of a rank


class Given(torch.nn.Module):
    """A router whose choices are given."""

    num_experts, top_k = EXPERTS, 2

    def __init__(self, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
        super().__init__()
        scores_TE = torch.zeros(TOKENS, EXPERTS)
        self.routing = Routing(topk_ids_TK, topk_weights_TK, scores_TE, scores_TE)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None, taken_T1: Tensor | None) -> Routing:
        return self.routing


def exactly(rank: int, world_size: int, dtype: torch.dtype) -> None:
    """Small whole numbers, experts with ReLU, gate weights 1, 1/2 and 1/4: no product or sum is ever rounded, so its
    order is of no account."""
    dist.init_process_group("gloo")
    common, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)

    def whole(*shape: int, generator: torch.Generator = draw) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    share = EXPERTS // world_size
    here = range(rank * share, (rank + 1) * share)
    experts = Experts(DIM, FFN, EXPERTS, here).to(dtype)
    experts.act = Activation(torch.relu, lambda da_RF, h_RF: da_RF * (h_RF > 0))
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(whole(EXPERTS, *weight.shape[1:], generator=common)[here])
    x_BTD, dy_BTD = whole(1, TOKENS, DIM), whole(1, TOKENS, DIM)
    ids_TK = torch.rand(TOKENS, EXPERTS, generator=draw).topk(2).indices
    weights_TK = (0.5 ** torch.randint(3, (TOKENS, 2), generator=draw)).to(dtype)

    results = {}
    for factor in (None, EXPERTS / 2, float(EXPERTS)):  # a slot for each token, then for each copy
        for chunks in (1, 2):
            x, weights = x_BTD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
            stream = MoEStream(Given(ids_TK, weights), experts, AllToAllDispatcher(None, EXPERTS), factor)
            y, stats = stream(x, None, chunks)
            assert int(stats.num_dropped) == 0
            y.backward(dy_BTD)
            results[factor, chunks] = [y.detach(), *(leaf.grad for leaf in (x, weights, *experts.parameters()))]
            experts.zero_grad()
    dropless = results[None, 1]
    assert all(t.abs().max() > 0 and torch.equal(4 * t, (4 * t).round()) for t in dropless)
    for how, tensors in results.items():
        assert all(torch.equal(t, expected) for t, expected in zip(tensors, dropless, strict=True)), how


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.representative), torch.float64])
def test_29_ample_room_is_dropless_to_the_bit(dtype):
    """Outputs, and the gradients of tokens, gate weights and experts, which hold the sums of both ranks' rows."""
    run_ranks(exactly, 2, dtype)


# ---------------------------------------------------------------------- 30: padding

REAL, PADDED = 9, 16  # real tokens of a rank and all of them


def pad(rank: int, world_size: int, factor: float | None) -> None:
    """A rank's real tokens stand at other places than the other's; the rest is padding, full of junk."""
    dist.init_process_group("gloo")
    share = EXPERTS // world_size
    experts = Experts(DIM, FFN, EXPERTS, range(rank * share, (rank + 1) * share))
    experts.init_weights("experts", 0.3, 0.3)
    router = randomise(Router(DIM, EXPERTS, 2), seed=0)
    stream = MoEStream(router, experts, AllToAllDispatcher(None, EXPERTS), factor).double()
    draw = torch.Generator().manual_seed(rank)
    x_BSD = torch.randn(2, PADDED // 2, DIM, generator=draw, dtype=torch.float64)
    mask_BS = torch.zeros(PADDED, dtype=torch.bool)
    mask_BS[torch.randperm(PADDED, generator=draw)[:REAL]] = True
    mask_BS = mask_BS.view(2, -1)

    outputs = []
    for x, mask in ((x_BSD.where(mask_BS[..., None], 100.0), mask_BS), (x_BSD[mask_BS][None], None)):
        y, stats = stream(x, mask)
        y.square().sum().backward()
        outputs.append((y, stats, {name: p.grad.clone() for name, p in stream.named_parameters()}))
        stream.zero_grad()
    (padded, stats, grads), (real, real_stats, real_grads) = outputs
    assert_close(padded[mask_BS], real[0], TOLERANCE)
    assert (padded[~mask_BS] == 0).all()
    assert int(stats.num_dropped) == int(real_stats.num_dropped)
    assert (int(stats.num_dropped) > 0) == (factor == 0.7)
    for name, grad in grads.items():
        assert_close(grad, real_grads[name], TOLERANCE, name)


@pytest.mark.parametrize("factor", [None, 8.0, 0.7])
def test_30_padding_takes_no_slot_and_changes_nothing(factor):
    run_ranks(pad, 2, factor)
