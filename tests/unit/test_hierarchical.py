"""Two hops bring every row where one exchange brings it, for any numbers of rows, without a
network.

A row is the pair (sender, its place there). The tests play both hops for all ranks of a grid of
nodes.
"""

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scmoe.moe.dispatcher import Traffic
from scmoe.parallel.wire.hierarchical import (
    Blocks,
    column_sums,
    equal_hops,
    hops_of,
    row_sums,
    swap_blocks,
)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Returns numbers of rows by [sender, receiver], many of them 0, and the number of ranks on a
    node."""
    nodes, places = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    ranks = nodes * places
    numbers = draw(st.lists(st.integers(0, 3), min_size=ranks**2, max_size=ranks**2))
    return torch.tensor(numbers).view(ranks, ranks), places


def rows_of(by_rank: Tensor) -> list[Tensor]:
    """Returns the rows of each rank, all different."""
    numbers = by_rank.sum(1).tolist()
    return [
        torch.stack([torch.full((n,), rank), torch.arange(n)], 1) for rank, n in enumerate(numbers)
    ]


def exchanged(rows: list[Tensor], sent: list[list[int]]) -> list[Tensor]:
    """Returns what each rank of a group receives if each sends so many rows to each."""
    pieces = [own.split(numbers) for own, numbers in zip(rows, sent, strict=True)]
    return [torch.cat(from_all) for from_all in zip(*pieces, strict=True)]


def two_hops(by_rank: Tensor, places: int) -> list[Tensor]:
    ranks = range(len(by_rank))
    hops = [hops_of(by_rank, rank, places) for rank in ranks]
    between = [[rank for rank in ranks if rank % places == place] for place in range(places)]
    within = [
        [rank for rank in ranks if rank // places == node] for node in range(len(ranks) // places)
    ]
    rows = rows_of(by_rank)
    for groups, numbers_of, received in (
        (between, lambda own: row_sums(own.first), "between"),
        (within, lambda own: column_sums(own.between), "last"),
    ):
        for group in groups:
            sent = [numbers_of(hops[rank]) for rank in group]
            arrived = exchanged([rows[rank] for rank in group], sent)
            for i, rank in enumerate(group):
                blocks: Blocks = getattr(hops[rank], received)
                assert row_sums(blocks) == [numbers[i] for numbers in sent], (
                    "both ends know the numbers"
                )
                rows[rank] = swap_blocks(arrived[i], blocks)
    return rows


@given(grids())
def test_two_hops_equal_one(grid):
    by_rank, places = grid
    for ours, flat in zip(
        two_hops(by_rank, places), exchanged(rows_of(by_rank), by_rank.tolist()), strict=True
    ):
        assert torch.equal(ours, flat)


@given(grids(), st.integers(0, 15))
def test_the_way_back_meets_the_same_rows(grid, number):
    """What a rank sends, its gradient brings back in the same blocks."""
    by_rank, places = grid
    rank = number % len(by_rank)
    there = Traffic(by_rank[rank].tolist(), by_rank[:, rank].tolist(), by_rank)
    back = there.back()
    assert torch.equal(back.by_rank, by_rank.T) and torch.equal(back.back().by_rank, by_rank)
    hops, way_back = (hops_of(traffic.by_rank, rank, places) for traffic in (there, back))
    assert hops.first == [list(column) for column in zip(*way_back.last, strict=True)]
    assert [*chain(*hops.first)] == there.sent and [*chain(*way_back.first)] == there.received


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.data())
def test_equal_numbers_are_a_case_of_any_numbers(nodes, places, n, data):
    ranks = nodes * places
    rank = data.draw(st.integers(0, ranks - 1))
    assert equal_hops(n * ranks, nodes, places) == hops_of(
        torch.full((ranks, ranks), n), rank, places
    )
