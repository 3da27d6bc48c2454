"""Fault 30: padding takes no slot.

Outside training, ranks may have different numbers of tokens.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from experiments.engine.ranks import run_ranks
from scmoe.api import MoE
from scmoe.moe.experts import Activation, Experts
from scmoe.moe.layout import Buffers, Capacity, Dropless, Rows, choose_rows
from scmoe.moe.router import THE_PAPERS, Router
from scmoe.moe.stream import MoEStream
from scmoe.moe.tokens import Routing
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher
from tests.support.models import assert_close, randomise
from tests.support.trainings import users_trainer

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

TOLERANCE = 1e-12
# FFN: features between an expert's two products; TOKENS: per rank
DIM, FFN, EXPERTS, TOKENS = (16, 24, 8, 12)


class Given(torch.nn.Module):
    """This router returns the choices that it is given."""

    num_experts, zero_experts, top_k, scoring = EXPERTS, 0, 2, THE_PAPERS

    def __init__(self, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
        super().__init__()
        scores_TE = torch.zeros(TOKENS, EXPERTS)
        self.routing = Routing(topk_ids_TK, topk_weights_TK, scores_TE, scores_TE)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None, excluded_T1: Tensor | None) -> Routing:
        return self.routing


def exactly(rank: int, world_size: int) -> None:
    """Compare outputs, and the gradients of tokens, gate weights and experts, which sum over both
    ranks' rows.

    Values are small whole numbers, experts use ReLU, and gate weights are 1, 1/2 and 1/4: no
    product or sum is rounded, so its order has no effect."""
    dist.init_process_group("gloo")
    common, draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)

    def whole(*shape: int, generator: torch.Generator = draw) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    share = EXPERTS // world_size
    here = range(rank * share, (rank + 1) * share)
    experts = Experts(DIM, FFN, EXPERTS, here)
    experts.act = Activation(
        torch.relu,
        lambda h_RF, out_RF: torch.clamp(h_RF, min=0, out=out_RF),
        lambda da_RF, h_RF, out_RF: torch.mul(da_RF, h_RF > 0, out=out_RF),
    )
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(whole(EXPERTS, *weight.shape[1:], generator=common)[here])
    x_BTD, dy_BTD = whole(1, TOKENS, DIM), whole(1, TOKENS, DIM)
    ids_TK = torch.rand(TOKENS, EXPERTS, generator=draw).topk(2).indices
    weights_TK = (0.5 ** torch.randint(3, (TOKENS, 2), generator=draw)).float()

    results = {}
    ways: list[Rows] = [Dropless(), Buffers(float(world_size))]
    for factor in (EXPERTS / 2, float(EXPERTS)):  # a slot for each token, then for each copy
        ways += [Capacity(factor, filled) for filled in (False, True)]
    for how in ways:
        for chunks in (1, 2):
            x, weights = x_BTD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
            dispatcher = AllToAllDispatcher(None, EXPERTS, buffered=isinstance(how, Buffers))
            stream = MoEStream(Given(ids_TK, weights), experts, dispatcher, how)
            y, stats = stream(x, None, chunks)
            assert int(stats.num_dropped) == 0
            y.backward(dy_BTD)
            results[how, chunks] = [
                y.detach(),
                *(leaf.grad for leaf in (x, weights, *experts.parameters())),
            ]
            experts.zero_grad()
    dropless = results[Dropless(), 1]
    assert all(t.abs().max() > 0 and torch.equal(4 * t, (4 * t).round()) for t in dropless)
    for way, tensors in results.items():
        assert all(
            torch.equal(t, expected) for t, expected in zip(tensors, dropless, strict=True)
        ), way


@pytest.mark.representative
def test_enough_slots_are_bit_identical_to_dropless():
    run_ranks(exactly, 2)


# ---------------------------------------------------------------------- padding

REAL, PADDED = 9, 16  # real tokens of a rank, all tokens of a rank


def pad(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    for factor in (None, 8.0, 0.7):
        pad_with(factor, rank, world_size)


def pad_with(factor: float | None, rank: int, world_size: int) -> None:
    """Real tokens stand at different places on each rank; the rest is padding with large values."""
    share = EXPERTS // world_size
    experts = Experts(DIM, FFN, EXPERTS, range(rank * share, (rank + 1) * share))
    experts.init_weights("experts", 0.3, 0.3)
    router = randomise(Router(DIM, EXPERTS, 2), seed=0)
    stream = MoEStream(
        router, experts, AllToAllDispatcher(None, EXPERTS), choose_rows(factor)
    ).double()
    draw = torch.Generator().manual_seed(rank)
    x_BSD = torch.randn(2, PADDED // 2, DIM, generator=draw, dtype=torch.float64)
    mask_BS = torch.zeros(PADDED, dtype=torch.bool)
    mask_BS[torch.randperm(PADDED, generator=draw)[:REAL]] = True
    mask_BS = mask_BS.view(2, -1)

    outputs = []
    for x, mask in (
        (x_BSD.where(mask_BS[..., None], 100.0), mask_BS),
        (x_BSD[mask_BS][None], None),
    ):
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


def test_padding_takes_no_slot_and_changes_nothing():
    run_ranks(pad, 2)


# -------------------------------------------------- different numbers of tokens on ranks


class Predicting(LightningModule):
    def configure_model(self) -> None:
        torch.manual_seed(1)
        self.moe = MoE(DIM, EXPERTS, ffn_dim=FFN, capacity_factor=2.0, group=self.wire).double()

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        return batch[0], self.moe(batch[0])[0]


def predictions(rank: int, world_size: int) -> list[tuple[int, Tensor]]:
    """Return for each batch its number of samples, and how far the result is from that of all
    experts in a process."""
    x_BSD = torch.randn(
        7, TOKENS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    loader = DataLoader(TensorDataset(x_BSD), batch_size=2)
    results = users_trainer(world_size, "expert_parallel").predict(Predicting(), loader)
    torch.manual_seed(1)
    whole = MoE(DIM, EXPERTS, ffn_dim=FFN, capacity_factor=2.0).double()
    with torch.no_grad():
        return [(len(x), (whole(x)[0] - y).abs().max()) for x, y in results]  # type: ignore[misc,union-attr]


@pytest.mark.representative
def test_ranks_may_have_different_numbers_of_tokens_outside_training():
    """Lightning gives four of seven samples to the first rank. All slots would then be exchanges of
    different sizes."""
    sizes = []
    for found in run_ranks(predictions, 2):
        assert all(error <= TOLERANCE for _, error in found)
        sizes.append([size for size, _ in found])
    assert sizes == [[2, 2], [2, 1]]
