"""The whole MoE stream handles padding, capacity, unbalanced routing, several open streams and
mixed precision."""

import math

import pytest
import torch
from torch import Tensor

from scmoe.moe.balance import integer_sums
from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Buffers, Capacity, Target, choose_rows
from scmoe.moe.router import Router, Scoring, by_sign
from scmoe.moe.stream import MoEStream
from scmoe.moe.tokens import MoEOutput
from tests.support.models import DIM, EXPERTS, FFN, assert_close, gradients, randomise, tiny_stream

MASK_BS = torch.tensor([[True] * 8 + [False] * 4, [True] * 3 + [False] * 9])


def tokens(batch_size: int = 2, seq_len: int = 12) -> Tensor:
    """Return tokens in eighths: the gate's products with weights in eighths are exact in any order
    of their sums."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-20, 21, (batch_size, seq_len, DIM), generator=generator).double() / 8


def exact_stream(top_k: int, capacity_factor: float | None) -> MoEStream:
    stream = tiny_stream(top_k, capacity_factor)
    with torch.no_grad():
        stream.router.gate.weight.mul_(8).round_().div_(8)
    return stream


def outcome(
    stream: MoEStream, x_BSD: Tensor, mask_BS: Tensor | None = None, chunks: int = 1
) -> tuple[MoEOutput, dict[str, Tensor]]:
    """Return the output, and the gradients of its sum of squares; the input's gradient is under
    'x'."""
    x_BSD = x_BSD.clone().requires_grad_()
    output = stream(x_BSD, mask_BS, chunks)
    output.y_BSD.square().sum().backward()
    return output, {"x": x_BSD.grad, **gradients(stream)}


def test_in_use_no_buffer_drops_a_token():
    """All tokens choose one expert, whose rank has room for its fair share of them in training."""
    ids_TK, num_ranks = torch.zeros(9, 1, dtype=torch.long), EXPERTS // 2
    rows = Buffers(1.0)
    assert (
        rows.arrange(ids_TK, None, Target(EXPERTS, num_ranks)).num_dropped == 9 - 9 * 2 // EXPERTS
    )
    assert (
        rows.dropless(EXPERTS)
        .arrange(ids_TK, None, Target(EXPERTS, num_ranks, training=False))
        .num_dropped
        == 0
    )


@pytest.mark.parametrize("shape", ((0, 12), (2, 0), (0,)))
def test_a_load_balance_loss_of_each_sequence_takes_no_tokens(shape):
    stats = sequence_stream()(torch.zeros(*shape, DIM, dtype=torch.float64)).stats
    assert stats.num_tokens == 0 and stats.score_sums_E.tolist() == [0] * EXPERTS


def test_tokens_without_a_batch_dimension_are_one_sequence():
    stream, x = sequence_stream(), tokens(1)
    assert torch.equal(stream(x[0]).stats.score_sums_E, stream(x).stats.score_sums_E)


def sequence_stream() -> MoEStream:
    """Return a stream whose load-balance loss is that of each sequence."""
    stream = tiny_stream()
    stream.router.scoring = Scoring(per_sequence=True)
    return stream


# ---------------------------------------------------------------------- zero experts


class Counting(LocalDispatcher):
    """Counts the rows that are sent."""

    sent = 0

    def dispatch(self, rows_RD, counts):
        self.sent += len(rows_RD)
        return super().dispatch(rows_RD, counts)


def zero_stream(capacity_factor: float | None = None, weight: float = 0.0) -> MoEStream:
    """Return a stream whose gate prefers zero experts with a large `weight`, whatever the
    token."""
    router = Router(DIM, EXPERTS, 2, scoring=Scoring(normalise=False, scale=6), zero_experts=3)
    experts = Experts(DIM, FFN, EXPERTS)
    stream = MoEStream(router, experts, Counting(), choose_rows(capacity_factor))
    randomise(stream.double())
    with torch.no_grad():
        router.gate.weight[EXPERTS:, 0] += weight
    return stream


@pytest.mark.parametrize("mask_BS", (None, MASK_BS), ids=("whole", "padded"))
@pytest.mark.parametrize("chunks", (1, 3))
def test_nothing_is_sent_for_a_zero_expert(chunks, mask_BS):
    stream, x = zero_stream(), tokens()
    routing = stream.router(x.flatten(0, 1), None if mask_BS is None else mask_BS.flatten())
    real = (routing.topk_ids_TK < EXPERTS).sum().item()
    output, grads = outcome(stream, x, mask_BS, chunks)
    assert 0 < real < 2 * (24 if mask_BS is None else 11)
    assert stream.dispatcher.sent == real == output.stats.counts_E.sum()
    assert output.stats.num_dropped == 0
    if mask_BS is not None:
        assert (output.y_BSD[~mask_BS] == 0).all() and (grads["x"][~mask_BS] == 0).all()


def test_tokens_that_choose_only_zero_experts_send_nothing_and_come_back_scaled():
    stream, x = zero_stream(weight=1e3), tokens()
    x[..., 0] = 1.0
    routing = stream.router(x.flatten(0, 1))
    assert (routing.topk_ids_TK >= EXPERTS).all()
    output, grads = outcome(stream, x)
    assert stream.dispatcher.sent == 0 and output.stats.counts_E.sum() == 0
    assert_close(output.y_BSD, x * routing.topk_weights_TK.sum(-1).view(2, 12, 1))
    assert {name for name, grad in grads.items() if grad.any()} == {"x", "router.gate.weight"}


@pytest.mark.parametrize("top_k", (1, 2))
def test_zero_experts_that_are_never_chosen_change_no_bit(top_k):
    """Sigmoid scores do not depend on each other, and -inf as a selection bias rules an expert
    out."""
    scoring = Scoring(torch.sigmoid, sums_to_one=False, scale=2.5, rule=by_sign)
    plain, further = (
        Router(DIM, EXPERTS, top_k, scoring=scoring, zero_experts=zero) for zero in (0, 3)
    )
    streams = [
        MoEStream(router, Experts(DIM, FFN, EXPERTS), Counting()).double()
        for router in (plain, further)
    ]
    randomise(streams[0])
    with torch.no_grad():
        # so that products do not depend on the number of rows
        plain.gate.weight.mul_(8).round_().div_(8)
        streams[1].experts.load_state_dict(streams[0].experts.state_dict())
        further.gate.weight[:EXPERTS], further.gate.weight[EXPERTS:] = plain.gate.weight, 2.0
        further.bias.weight[:EXPERTS], further.bias.weight[EXPERTS:] = plain.bias.weight, -math.inf
    (old, old_grads), (new, grads) = (outcome(stream, tokens()) for stream in streams)
    assert torch.equal(old.y_BSD, new.y_BSD)
    assert streams[0].dispatcher.sent == streams[1].dispatcher.sent == 24 * top_k
    assert not grads["router.gate.weight"][EXPERTS:].any()
    assert all(
        torch.equal(grads[name], g) for name, g in old_grads.items() if name.startswith("experts")
    )


def test_zero_experts_take_their_share_of_a_capacity():
    """24 tokens x 2 copies over 6 + 3 ids: the fair share is 48 / 9, and a factor of 1.5 gives 8
    slots, not 12."""
    stream = zero_stream(1.5)
    stream(tokens())
    assert stream.dispatcher.sent == EXPERTS * 8


# ---------------------------------------------------------------------- padding (fault 30)


@pytest.mark.parametrize("capacity_factor", (None, 2.0, 0.7))
@pytest.mark.parametrize("top_k", (1, 2))
def test_the_content_of_padding_changes_no_bit(top_k, capacity_factor):
    x = tokens()
    other = x.where(MASK_BS[..., None], 100.0)
    (output, grads), (output_2, grads_2) = (
        outcome(tiny_stream(top_k, capacity_factor), tensor, MASK_BS) for tensor in (x, other)
    )
    assert torch.equal(output.y_BSD, output_2.y_BSD)
    assert all(torch.equal(grads[name], grads_2[name]) for name in grads)
    assert torch.equal(integer_sums([output.stats]), integer_sums([output_2.stats]))
    assert (output.y_BSD[~MASK_BS] == 0).all() and (grads["x"][~MASK_BS] == 0).all()


@pytest.mark.parametrize("top_k", (1, 2))
def test_padded_and_unpadded_are_bit_identical(top_k):
    """Without drops each expert gets the same rows in the same order."""
    x = tokens()
    padded, grads = outcome(exact_stream(top_k, None), x, MASK_BS)
    real, real_grads = outcome(exact_stream(top_k, None), x[MASK_BS][None])
    assert torch.equal(padded.y_BSD[MASK_BS], real.y_BSD[0])
    for name in ("experts.w_in_eDF", "experts.w_out_eFD"):
        assert torch.equal(grads[name], real_grads[name])
    # equal to 1e-12: the gate's products have another number of rows, which may change the order of
    # their sums
    assert_close(grads["x"][MASK_BS], real_grads["x"][0])
    assert_close(grads["router.gate.weight"], real_grads["router.gate.weight"])
    assert torch.equal(integer_sums([padded.stats]), integer_sums([real.stats]))
    assert_close(padded.stats.score_sums_E, real.stats.score_sums_E)


@pytest.mark.parametrize("capacity_factor", (0.7, 0.5))
def test_padding_does_not_change_which_copies_are_dropped(capacity_factor):
    x = tokens()
    padded, _ = outcome(exact_stream(2, capacity_factor), x, MASK_BS)
    real, _ = outcome(exact_stream(2, capacity_factor), x[MASK_BS][None])
    assert real.stats.num_dropped > 0
    assert padded.stats.num_dropped == real.stats.num_dropped
    assert_close(padded.y_BSD[MASK_BS], real.y_BSD[0])


@pytest.mark.parametrize("capacity_factor", (None, 1.0))
def test_a_batch_of_padding_alone_gives_zeros(capacity_factor):
    output, grads = outcome(
        tiny_stream(2, capacity_factor), tokens(), torch.zeros(2, 12, dtype=torch.bool)
    )
    assert all((t == 0).all() for t in (output.y_BSD, *grads.values()))


# ---------------------------------------------------------------------- capacity and load


def aimed_at(stream: MoEStream, expert: int) -> tuple[MoEStream, Tensor]:
    """Return the stream, and tokens whose first choice is this expert."""
    with torch.no_grad():
        stream.router.gate.weight[:, 0] = 0.0
        stream.router.gate.weight[expert, 0] = 30.0
    x = tokens() / 4
    x[..., 0] = 4.0
    return stream, x


@pytest.mark.parametrize("capacity_factor", (None, float(EXPERTS), 1.0))
@pytest.mark.parametrize("chunks", (1, 3))
@pytest.mark.parametrize("expert", (0, EXPERTS - 1))
def test_all_tokens_to_one_expert(expert, chunks, capacity_factor):
    """Fault 20: the idle experts' gradients are zero, not None."""
    stream, x = aimed_at(tiny_stream(1, capacity_factor), expert)
    output, grads = outcome(stream, x, chunks=chunks)
    assert output.stats.counts_E.tolist() == [24 * (i == expert) for i in range(EXPERTS)]
    assert output.stats.num_dropped == (20 if capacity_factor == 1.0 else 0)
    served = output.y_BSD.flatten(0, 1).abs().amax(1) > 0
    assert served.tolist() == [
        t < 24 - output.stats.num_dropped for t in range(24)
    ]  # early tokens first
    for name in ("experts.w_in_eDF", "experts.w_out_eFD"):
        moved = grads[name].abs().amax((1, 2)) > 0
        assert moved.tolist() == [i == expert for i in range(EXPERTS)]


# ---------------------------------------------------------------------- state and precision


def test_forward_keeps_no_state_and_streams_may_be_open_at_once():
    stream, x = tiny_stream(2, 1.0), tokens()
    before = {name: value for name, value in vars(stream).items() if not name.startswith("_")}
    alone = [stream(x, None, 2).y_BSD, stream(-x, None, 2).y_BSD]
    states = [stream.begin(x, None, 2), stream.begin(-x, None, 2)]
    states = [stream.run_experts(state) for state in reversed(states)]
    together = [stream.finish(state).y_BSD for state in reversed(states)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert {
        name: value for name, value in vars(stream).items() if not name.startswith("_")
    } == before


def test_rows_travel_in_the_dtype_of_autocast():
    stream = tiny_stream(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        state = stream.begin(tokens().float())
    assert state.transfers[0].wait().dtype == torch.bfloat16
    assert state.routing.topk_weights_TK.dtype == torch.float32


# -------------------------------------------------- rows for the filled slots alone


@pytest.mark.parametrize("chunks", (1, 2))
@pytest.mark.parametrize("capacity_factor", (2.0, 1.0, 0.5))
@pytest.mark.parametrize("top_k", (1, 2))
def test_filled_rows_give_what_slots_give(top_k, capacity_factor, chunks):
    """The same copies are dropped, with padding too; outputs and gradients differ by the products'
    rounding at most."""
    slots, filled = (exact_stream(top_k, capacity_factor) for _ in range(2))
    filled.load_state_dict(slots.state_dict())
    filled.rows = choose_rows(capacity_factor, filled=True)
    (expected, grads), (output, own) = (
        outcome(stream, tokens(), MASK_BS, chunks) for stream in (slots, filled)
    )
    assert torch.equal(integer_sums([output.stats]), integer_sums([expected.stats]))
    assert_close(output.y_BSD, expected.y_BSD, 1e-12, "output")
    for name, grad in grads.items():
        assert_close(own[name], grad, 1e-12, f"gradient of {name}")


def test_filled_rows_are_as_many_as_the_copies_that_are_kept():
    stream, sizes = exact_stream(1, 2.0), []
    stream.rows = Capacity(2.0, filled=True)
    stream.experts.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    x = tokens()
    dropped = int(stream(x).stats.num_dropped)
    assert sizes == [x.shape[0] * x.shape[1] - dropped]
