"""Layouts, encode and decode obey these laws for random routings with padding, capacities and
chunks."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from scmoe.moe.dispatcher import ChunkCounts, LocalDispatcher
from scmoe.moe.gather import gather
from scmoe.moe.layout import (
    Layout,
    arrange_buffers,
    arrange_filled,
    arrange_slots,
    decode,
    drop_beyond,
    encode,
    expert_capacity,
)
from tests import reference


class Case(NamedTuple):
    ids_TK: Tensor
    num_experts: int
    capacity: int | None
    num_chunks: int
    filled: bool = False

    @property
    def has_slots(self) -> bool:
        return self.capacity is not None and not self.filled

    def layout(self, limit: Tensor | None = None) -> Layout:
        ids_TK, num_experts, _, chunks, _ = self
        if self.capacity is None:
            return arrange_filled(ids_TK, num_experts, chunks)
        room = self.capacity if limit is None else limit
        if self.filled:
            return arrange_filled(drop_beyond(ids_TK, num_experts, room), num_experts, chunks)
        return arrange_slots(ids_TK, num_experts, self.capacity, chunks, room)


@st.composite
def cases(draw) -> Case:
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(3, num_experts)))
    row = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    padding = st.just([num_experts] * top_k)
    ids = draw(st.lists(st.one_of(row, row, padding), min_size=1, max_size=16))
    capacity = draw(st.none() | st.integers(1, 10))
    return Case(
        torch.tensor(ids), num_experts, capacity, draw(st.integers(1, 4)), draw(st.booleans())
    )


def kept(case: Case) -> set[tuple[int, int]]:
    """Return the copies that the oracle keeps, without padding, which the oracle treats as one
    more expert."""
    ids = case.ids_TK.tolist()
    found = reference.kept_copies(ids, case.num_experts + 1, case.capacity)
    return {(t, k) for t, k in found if ids[t][k] < case.num_experts}


def encoded(x_TD: Tensor, layout: Layout) -> list[tuple[Tensor, ChunkCounts | None]]:
    """Return the rows of each chunk, and their counts as one rank announces them to itself."""
    counts_PE = layout.counts_PE
    return encode(
        x_TD, layout, None if counts_PE is None else LocalDispatcher().announce(counts_PE)
    )


def whole_numbers(*shape: int) -> Tensor:
    """Return whole numbers. Their sums are exact, so that results can be bit-identical."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).double()


def experts_of_rows(case: Case, layout: Layout) -> list[int]:
    """Return the expert of each row, from the layout's order (chunk, expert)."""
    if layout.counts_PE is not None:
        return [
            e
            for counts in layout.counts_PE.tolist()
            for e, n in enumerate(counts)
            for _ in range(n)
        ]
    slots = layout.tokens_R.shape[0] // (case.num_chunks * case.num_experts)
    return [
        e for _ in range(case.num_chunks) for e in range(case.num_experts) for _ in range(slots)
    ]


@given(cases())
# two tokens, one slot: a random case does not always have this
@example(Case(torch.tensor([[0], [0]]), 1, 1, 1))
@example(Case(torch.tensor([[0], [0]]), 1, 1, 1, filled=True))
def test_exactly_the_oracles_copies_are_kept_each_in_a_row_of_its_own_with_its_expert(case):
    """First choices come first, then early tokens; padding takes no slot; chunks change nothing."""
    layout = case.layout()
    (num_tokens, top_k), num_rows = case.ids_TK.shape, len(layout.tokens_R)
    assert {(t, k) for t, k in (layout.rows_TK < num_rows).nonzero().tolist()} == kept(case)
    assert layout.num_dropped == case.ids_TK.numel() - len(kept(case))
    experts = experts_of_rows(case, layout)
    assert len(experts) == num_rows
    taken = {}
    for t, k in kept(case):
        row = layout.rows_TK[t, k].item()
        assert row not in taken
        taken[row] = t * top_k + k
        assert layout.tokens_R[row] == t and layout.copies_R[row] == t * top_k + k
        assert experts[row] == case.ids_TK[t, k]
    empty = [row for row in range(num_rows) if row not in taken]
    assert all(
        layout.copies_R[row] == num_tokens * top_k and layout.tokens_R[row] == 0 for row in empty
    )
    assert case.has_slots or not empty


@given(cases(), st.integers(0, 10))
def test_a_limit_drops_what_the_same_capacity_drops_and_keeps_the_shapes(case, limit):
    if case.capacity is not None:
        limited = case.layout(torch.tensor(min(limit, case.capacity)))
        is_kept = limited.rows_TK < len(limited.tokens_R)
        assert {(t, k) for t, k in is_kept.nonzero().tolist()} == kept(
            case._replace(capacity=min(limit, case.capacity))
        )
        if case.has_slots:
            assert torch.equal(limited.rows_TK[is_kept], case.layout().rows_TK[is_kept])
            assert len(limited.tokens_R) == len(case.layout().tokens_R)


@given(cases())
def test_counts_are_those_of_the_copies(case):
    layout = case.layout()
    ids, is_kept = case.ids_TK, layout.rows_TK < len(layout.tokens_R)
    rows_of_expert = torch.bincount(ids[is_kept], minlength=case.num_experts)
    if not case.has_slots:
        assert layout.counts_PE.shape == (case.num_chunks, case.num_experts)
        assert layout.counts_PE.sum() == len(layout.tokens_R)
        assert torch.equal(layout.counts_PE.sum(0), rows_of_expert)
        assert layout.complete == (rows_of_expert.sum() == ids.numel())
    else:
        assert not layout.complete
        assert len(layout.tokens_R) == case.num_chunks * case.num_experts * math.ceil(
            case.capacity / case.num_chunks
        )


@given(cases())
def test_encode_gives_each_row_its_token_and_decode_undoes_it(case):
    """Each kept copy comes back with its weight; a dropped copy adds nothing."""
    layout = case.layout()
    x_TD, weights_TK = whole_numbers(case.ids_TK.shape[0], 8), whole_numbers(*case.ids_TK.shape)
    chunks = encoded(x_TD, layout)
    assert len(chunks) == case.num_chunks
    for p, (rows, counts) in enumerate(chunks):
        if not case.has_slots:
            assert torch.equal(counts.counts_from_e[0], layout.counts_PE[p])
            assert counts.counts_from_e.sum() == len(rows)
        else:
            assert counts is None and len(rows) == len(layout.tokens_R) // case.num_chunks
    rows = torch.cat([rows for rows, _ in chunks])
    assert torch.equal(rows, x_TD[layout.tokens_R])
    is_kept = layout.rows_TK < len(layout.tokens_R)
    assert torch.equal(
        decode(rows, weights_TK, layout), (weights_TK * is_kept).sum(1, keepdim=True) * x_TD
    )


@given(cases())
def test_gradients_are_those_of_plain_indexing(case):
    """The hand-written gradients and autograd's through index and sum are bit-identical for whole
    numbers."""
    layout = case.layout()
    (num_tokens, top_k), num_rows = case.ids_TK.shape, len(layout.tokens_R)
    x_TD, weights_TK = whole_numbers(num_tokens, 8), whole_numbers(num_tokens, top_k)
    scale_RD, grad_TD = whole_numbers(num_rows, 8), whole_numbers(num_tokens, 8).flip(0)

    def gradients(forward) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x_TD, weights_TK, scale_RD)]
        forward(*leaves).backward(grad_TD)
        return [leaf.grad for leaf in leaves]

    def fast(x, weights, scale):
        return decode(
            gather(x, layout.tokens_R, layout.rows_TK, layout.complete) * scale, weights, layout
        )

    def plain(x, weights, scale):
        padded = torch.cat([x[layout.tokens_R] * scale, x.new_zeros(1, 8)])  # row R is zero
        return (padded[layout.rows_TK] * weights[..., None]).sum(1)

    for actual, expected in zip(gradients(fast), gradients(plain), strict=True):
        assert torch.equal(actual, expected)


@given(cases())
def test_padding_does_not_change_the_rows_of_real_tokens(case):
    """Fault 30: real tokens get the same rows as in a batch without the padding."""
    real = case.ids_TK[:, 0] < case.num_experts
    if (
        case.num_chunks > 1 and not case.has_slots
    ):  # it cuts the tokens into chunks, padding included
        case = case._replace(num_chunks=1)
    if real.any():
        layout, unpadded = case.layout(), case._replace(ids_TK=case.ids_TK[real]).layout()
        assert torch.equal(layout.rows_TK[real], unpadded.rows_TK)
        assert len(layout.tokens_R) == len(unpadded.tokens_R)
        assert (layout.rows_TK[~real] == len(layout.tokens_R)).all()


@st.composite
def buffers(draw) -> tuple[Case, int, int]:
    """Return a case without a capacity, the number of ranks, and the size of their buffers."""
    ranks, of_rank = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    num_experts = ranks * of_rank
    top_k = draw(st.integers(1, min(2, num_experts)))
    row = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    ids = draw(
        st.lists(st.one_of(row, row, st.just([num_experts] * top_k)), min_size=1, max_size=12)
    )
    return (
        Case(torch.tensor(ids), num_experts, None, draw(st.integers(1, 3))),
        ranks,
        draw(st.integers(1, 12)),
    )


@given(buffers())
def test_a_buffer_holds_the_first_copies_of_its_rank_in_the_order_of_its_experts(drawn):
    case, ranks, size = drawn
    layout = arrange_buffers(case.ids_TK, case.num_experts, ranks, size, case.num_chunks)
    of_rank, top_k = case.num_experts // ranks, case.ids_TK.shape[1]
    part = math.ceil(size / case.num_chunks)
    num_rows = case.num_chunks * ranks * part
    assert len(layout.tokens_R) == num_rows and not layout.complete
    wanted = reference.kept_copies((case.ids_TK // of_rank).tolist(), ranks + 1, size)
    wanted = {(t, k) for t, k in wanted if case.ids_TK[t, k] < case.num_experts}
    assert {(t, k) for t, k in (layout.rows_TK < num_rows).nonzero().tolist()} == wanted
    filled = {layout.rows_TK[t, k].item(): (t, k) for t, k in wanted}
    assert len(filled) == len(wanted), "each copy has a row of its own"
    for row, (t, k) in filled.items():
        assert layout.tokens_R[row] == t and layout.copies_R[row] == t * top_k + k
        assert row // part % ranks == case.ids_TK[t, k] // of_rank, "in a buffer of its rank"
    for p in range(case.num_chunks):
        for rank in range(ranks):
            start = (p * ranks + rank) * part
            experts = [
                case.ids_TK[filled[row]].item()
                for row in range(start, start + part)
                if row in filled
            ]
            assert experts == sorted(experts) and all(
                row in filled for row in range(start, start + len(experts))
            )
            counts = layout.counts_PE[p, rank * of_rank : (rank + 1) * of_rank].tolist()
            assert counts == [experts.count(e) for e in range(rank * of_rank, (rank + 1) * of_rank)]


def test_empty_slots_send_nothing_back():
    """A NaN that an expert computes for an empty slot reaches no token and no token's gradient."""
    layout = arrange_slots(torch.tensor([[0], [2]]), 3, capacity=2)
    rows = torch.ones(6, 8)
    rows[layout.copies_R == 2] = math.nan
    rows.requires_grad_()
    weights = torch.ones(2, 1, requires_grad=True)
    y_TD = decode(rows, weights, layout)
    y_TD.sum().backward()
    assert torch.equal(y_TD, torch.ones(2, 8))
    assert torch.equal(weights.grad, torch.full((2, 1), 8.0))
    assert torch.equal(rows.grad, (layout.copies_R < 2)[:, None].float().expand(6, 8))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "factor", "expected"),
    [
        (24, 6, 1, 1.0, 4),
        (24, 6, 2, 1.0, 8),
        (25, 6, 1, 1.0, 5),
        (24, 6, 1, 1.25, 5),
        (1, 8, 1, 2.0, 1),
        (50, 5, 1, 1.1, 11),
    ],
)
def test_capacity_is_the_factor_times_the_fair_share_rounded_up(
    num_tokens, num_experts, top_k, factor, expected
):
    assert expert_capacity(num_tokens, num_experts, top_k, factor) == expected
    assert reference.capacity_of(num_tokens, num_experts, top_k, factor) == expected


def test_an_expert_has_no_more_slots_than_tokens():
    assert expert_capacity(num_tokens=10, num_experts=4, top_k=4, capacity_factor=2.0) == 10
