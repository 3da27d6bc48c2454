"""Encode and decode: tokens to expert-contiguous rows, and back.

A layout chooses the row of each routed copy, `encode` fills the rows, `decode` sums a token's
copies with their weights. Which copies have a row is a value that the stream has, Rows:

    Dropless()                every copy
    Capacity(factor, filled)  at most C copies of each expert, `factor` times its fair share: first
                              choices first, early tokens first. The others are dropped.
    Buffers(ceiling)          for each rank at most as many copies as its buffer holds, `ceiling`
                              times its fair share. The others are dropped.

There are three layouts:

    filled   every copy that is not dropped has a row; counts_PE holds the number of rows of each
             expert
    slots    each expert has C rows. Shapes do not depend on data, so the host waits for nothing. An
             empty slot repeats token 0: its result is not used, and its gradient is zero.
    buffers  all rows for the experts of one rank share a buffer of fixed size, in the order of its
             experts, so the host need not read how many there are. Empty rows are sent but not
             computed. Copies that do not fit are dropped.

With P chunks the rows of chunk p are contiguous, in the order (chunk, expert). `filled` cuts the
tokens into chunks, `slots` the slots of every expert, `buffers` every buffer, so P does not change
which copies are dropped. Both directions are gathers, forward and backward: a scatter-add would be
slower and, on CUDA, not deterministic.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from scmoe.moe.dispatcher import Announced, ChunkCounts
from scmoe.moe.gather import gather, pick


class Layout(NamedTuple):
    """The row of each routed copy. A copy that was dropped, or is padding, has row R."""

    rows_TK: Tensor  # row of each copy, 0..R
    tokens_R: Tensor  # token of each row
    copies_R: Tensor  # copy t K + k of each row, or T K: an empty slot
    counts_PE: Tensor | None  # rows per chunk and expert; None: all equal
    num_chunks: int
    # every copy has a row and every row a copy, as far as the host knows without asking
    complete: bool = False

    @property
    def num_dropped(self) -> Tensor:
        """Copies without a row, padding included."""
        return (self.rows_TK == self.tokens_R.shape[0]).sum()


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Return the slots of an expert for num_tokens tokens of one rank.

    They are capacity_factor times the fair share, rounded up, and at most one for each token, which
    chooses an expert once.
    """
    return min(num_tokens, int(rounded_up(capacity_factor * num_tokens * top_k / num_experts)))


def rounded_up(rows: Any) -> Any:
    """Return a number of rows rounded up.

    A product such as 1.1 x 50 is a rounding error above 55, and counts as 55.
    """
    rows = rows * (1 - 1e-12)
    return rows.ceil() if isinstance(rows, Tensor) else math.ceil(rows)


def places(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Return the position of each copy among those of its expert, from 0.

    First choices come first; among equal choices, early tokens.
    """
    (T, K), device = topk_ids_TK.shape, topk_ids_TK.device
    ids_N = topk_ids_TK.T.flatten()  # k-major: all first choices come before any second choice
    order_N = ids_N.argsort(stable=True)
    sorted_N = ids_N[order_N]
    first_E = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=device))
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(T * K, device=device) - first_E[sorted_N]
    return place_N.view(K, T).T


def drop_beyond(topk_ids_TK: Tensor, num_experts: int, room: int | Tensor) -> Tensor:
    """Return the ids, with num_experts (none) for every copy beyond the first `room` of its
    expert."""
    return topk_ids_TK.where(places(topk_ids_TK, num_experts) < room, num_experts)


def arrange_filled(
    topk_ids_TK: Tensor, num_experts: int, num_chunks: int = 1, padded: bool = True
) -> Layout:
    """Choose a row for every copy. Expert id num_experts means none.

    padded: there may be such ids. Without them the host knows the number of rows and does not wait
    for it.
    """
    T, K = topk_ids_TK.shape
    E, P = num_experts, num_chunks
    group_N = topk_ids_TK.flatten()
    if P > 1:
        chunk_T = torch.arange(T, device=topk_ids_TK.device) // math.ceil(T / P)
        group_N = (chunk_T[:, None] * E + topk_ids_TK).where(topk_ids_TK < E, P * E).flatten()
    counts_PE = count(group_N, P * E).view(P, E)
    num_rows = int(counts_PE.sum()) if padded else T * K
    order_N = group_N.argsort(stable=True)
    numbers_N = torch.arange(T * K, device=order_N.device)
    rows_N = torch.empty_like(order_N).scatter_(0, order_N, numbers_N)
    copies_R = order_N[:num_rows]
    complete = num_rows == T * K
    rows_TK = (rows_N if complete else rows_N.clamp(max=num_rows)).view(T, K)
    return Layout(rows_TK, copies_R if K == 1 else copies_R // K, copies_R, counts_PE, P, complete)


def arrange_slots(
    topk_ids_TK: Tensor,
    num_experts: int,
    capacity: int,
    num_chunks: int = 1,
    room: int | Tensor | None = None,
) -> Layout:
    """Choose one of its expert's `capacity` slots for every copy. Expert id num_experts means none.

    room: number of an expert's slots that may be used; unlike `capacity` it may depend on the data.
    None: all.
    """
    T, K = topk_ids_TK.shape
    E, P = num_experts, num_chunks
    place_TK = places(topk_ids_TK, num_experts)
    slots = math.ceil(capacity / P)  # of one expert in one chunk
    num_rows = P * E * slots
    rows_TK = place_TK // slots * (E * slots) + topk_ids_TK * slots + place_TK % slots
    fits_TK = place_TK < (capacity if room is None else room)
    rows_TK = rows_TK.where(fits_TK & (topk_ids_TK < E), num_rows)
    copies_R = invert(rows_TK.flatten(), num_rows)
    tokens_R = (copies_R // K).where(copies_R < T * K, 0)
    return Layout(rows_TK.contiguous(), tokens_R, copies_R, None, P)


def invert(rows_N: Tensor, num_rows: int) -> Tensor:
    """Return the copy of each row [R]; N: an empty row. rows_N: row of each copy; R: no row."""
    copies_R = torch.full((num_rows + 1,), len(rows_N), device=rows_N.device)
    copies_R[rows_N] = torch.arange(len(rows_N), device=rows_N.device)
    return copies_R[:num_rows]


def count(groups_N: Tensor, num_groups: int) -> Tensor:
    """Return how often each number occurs in each row [.., N], as [.., num_groups].

    The number num_groups itself is left out. bincount would wait for the device.
    """
    zeros = groups_N.new_zeros(*groups_N.shape[:-1], num_groups + 1)
    return zeros.scatter_add_(-1, groups_N, torch.ones_like(groups_N))[..., :num_groups]


def encode(
    x_TD: Tensor, layout: Layout, announced: Announced | None
) -> list[tuple[Tensor, ChunkCounts | None]]:
    """Return for each chunk its rows [R/P, D] and their counts (None: all equal).

    It waits for `announced` last.
    """
    rows_RD = gather(x_TD, layout.tokens_R, layout.rows_TK, layout.complete)
    if announced is None:
        return [(rows, None) for rows in rows_RD.chunk(layout.num_chunks)]
    counts = announced.wait()
    sizes = [chunk.num_rows for chunk in counts if chunk.num_rows is not None]
    chunks = rows_RD.split(sizes) if sizes else rows_RD.chunk(layout.num_chunks)
    return list(zip(chunks, counts, strict=True))


def decode(rows_RD: Tensor, weights_TK: Tensor, layout: Layout) -> Tensor:
    """Return y_t = sum_k w_tk rows[row of copy (t, k)], [T, D] in the dtype of the rows.

    A copy without a row adds nothing.
    """
    weights_TK = weights_TK.to(rows_RD.dtype)
    if not torch.is_grad_enabled():
        return _weighted_sum(rows_RD, weights_TK, layout)
    return _Decode.apply(rows_RD, weights_TK, layout)


def _weighted_sum(rows_RD: Tensor, weights_TK: Tensor, layout: Layout) -> Tensor:
    y_TD = pick(rows_RD, layout.rows_TK[:, 0], layout.complete).mul_(weights_TK[:, :1])
    for k in range(1, weights_TK.shape[1]):
        picked_TD = pick(rows_RD, layout.rows_TK[:, k], layout.complete)
        y_TD.addcmul_(picked_TD, weights_TK[:, k : k + 1])
    return y_TD


class _Decode(Function):
    @staticmethod
    def forward(ctx, rows_RD, weights_TK, layout):
        ctx.save_for_backward(rows_RD, weights_TK, layout.rows_TK, layout.tokens_R, layout.copies_R)
        ctx.complete = layout.complete
        return _weighted_sum(rows_RD, weights_TK, layout)

    @staticmethod
    def backward(ctx, grad_TD):
        rows_RD, weights_TK, rows_TK, tokens_R, copies_R = ctx.saved_tensors
        grad_rows_RD = grad_TD.index_select(0, tokens_R)
        # the weight's gradient is the dot product of the row and its token's gradient
        dots_R = torch.linalg.vecdot(grad_rows_RD, rows_RD)
        dots_N1 = pick(dots_R[:, None], rows_TK.flatten(), ctx.complete)
        grad_weights_TK = dots_N1.view_as(weights_TK)
        weights_R = pick(weights_TK.reshape(-1, 1), copies_R, ctx.complete)
        return grad_rows_RD.mul_(weights_R), grad_weights_TK, None


def buffer_size(num_tokens: int, top_k: int, num_ranks: int, ceiling: float) -> int:
    """Return the rows of a rank's buffer for num_tokens tokens.

    They are `ceiling` times the fair share, and no more than all copies.
    """
    return min(int(rounded_up(ceiling * num_tokens * top_k / num_ranks)), num_tokens * top_k)


def arrange_buffers(
    topk_ids_TK: Tensor, num_experts: int, num_ranks: int, size: int, num_chunks: int = 1
) -> Layout:
    """Choose a row in the buffer of its expert's rank for every copy.

    Expert id num_experts means none.
    """
    T, K = topk_ids_TK.shape
    E, P = num_experts, num_chunks
    device = topk_ids_TK.device
    part = math.ceil(size / P)  # of a buffer in one chunk
    of_rank = E // num_ranks
    rank_TK = topk_ids_TK // of_rank  # padding has rank num_ranks
    kept_TK = (places(rank_TK, num_ranks) < size) & (topk_ids_TK < E)
    ids_N = topk_ids_TK.where(kept_TK, E).flatten()
    order_N = ids_N.argsort(stable=True)
    sorted_N = ids_N[order_N]
    first_R = torch.searchsorted(sorted_N, torch.arange(0, E + of_rank, of_rank, device=device))
    ranks_N = sorted_N // of_rank
    place_N = torch.arange(T * K, device=device) - first_R[ranks_N]  # in the buffer of its rank
    chunk_N, num_rows = place_N // part, P * num_ranks * part
    row_N = (chunk_N * num_ranks + ranks_N) * part + place_N % part
    row_N = row_N.where(sorted_N < E, num_rows)

    rows_N = torch.empty_like(order_N)
    rows_N[order_N] = row_N
    copies_R = invert(rows_N, num_rows)
    tokens_R = (copies_R // K).where(copies_R < T * K, 0)
    group_N = (chunk_N * E + sorted_N).where(sorted_N < E, P * E)
    return Layout(rows_N.view(T, K), tokens_R, copies_R, count(group_N, P * E).view(P, E), P)


# ---------------------------------------------------------------------- which copies have a row


class Target(NamedTuple):
    """What the copies are sent to.

    num_ranks: ranks that share the experts. training: every rank has equally many tokens.
    zero_experts: their copies have the id num_experts here, which means none; the fair share of a
    capacity is one in num_experts + zero_experts. Which copies these are depends on the data, so
    the host must read the number of rows.
    """

    num_experts: int
    num_ranks: int = 1
    chunks: int = 1
    training: bool = True
    zero_experts: int = 0


class Rows(Protocol):
    """Which copies have a row, and which row. sums: whether the router's sums are computed."""

    @property
    def sums(self) -> bool: ...

    def arrange(self, ids_TK: Tensor, mask_T: Tensor | None, target: Target) -> Layout:
        """Choose the row of each copy of this rank's tokens.

        mask_T False: padding, which takes no row.
        """

    def dropless(self, num_experts: int) -> "Rows":
        """Return the arrangement for inference.

        It drops nothing, fits the same dispatcher, and computes no sums.
        """


@dataclass(frozen=True)
class Dropless:
    sums: bool = True

    def arrange(self, ids_TK: Tensor, mask_T: Tensor | None, target: Target) -> Layout:
        padded = mask_T is not None or target.zero_experts > 0
        return arrange_filled(ids_TK, target.num_experts, target.chunks, padded)

    def dropless(self, num_experts: int) -> Rows:
        return Dropless(sums=False)


@dataclass(frozen=True)
class Capacity:
    """Each expert has `factor` times its fair share of slots.

    filled: send and compute only the filled slots. The host must know how many there are: this is
    free on a CPU, and a synchronisation on a GPU.
    """

    factor: float
    filled: bool = False
    sums = True

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1e6:
            raise ValueError(
                f"capacity_factor is {self.factor}, allowed: None, or above 0 and at most 1e6"
            )

    def arrange(self, ids_TK: Tensor, mask_T: Tensor | None, target: Target) -> Layout:
        """Choose slots, or the rows of filled slots.

        Outside training ranks may have different numbers of tokens, and therefore of slots: they
        announce the filled ones.
        """
        num_tokens, top_k = ids_TK.shape
        num_experts, shares = target.num_experts, target.num_experts + target.zero_experts
        capacity = expert_capacity(num_tokens, shares, top_k, self.factor)
        room: int | Tensor = capacity
        if mask_T is not None:
            # padding adds no capacity: its slots stay empty, so that shapes depend on no data
            room = rounded_up(self.factor * mask_T.sum().double() * top_k / shares)
        if self.filled or (not target.training and target.num_ranks > 1):
            kept_TK = drop_beyond(ids_TK, num_experts, room)
            return arrange_filled(kept_TK, num_experts, target.chunks)
        return arrange_slots(ids_TK, num_experts, capacity, target.chunks, room)

    def dropless(self, num_experts: int) -> Rows:
        return Dropless(sums=False)


@dataclass(frozen=True)
class Buffers:
    """Each rank has a buffer of `ceiling` times its fair share. It needs a dispatcher for buffers.

    On one rank there is no buffer, and nothing is dropped.
    """

    ceiling: float
    sums: bool = True

    def arrange(self, ids_TK: Tensor, mask_T: Tensor | None, target: Target) -> Layout:
        if target.num_ranks == 1:
            return Dropless().arrange(ids_TK, mask_T, target)
        num_tokens, top_k = ids_TK.shape
        size = buffer_size(num_tokens, top_k, target.num_ranks, self.ceiling)
        return arrange_buffers(ids_TK, target.num_experts, target.num_ranks, size, target.chunks)

    def dropless(self, num_experts: int) -> Rows:
        """Return buffers with room for every copy, because every rank must use the same layout."""
        return Buffers(float(num_experts), sums=False)


def choose_rows(capacity_factor: float | None, filled: bool = False) -> Rows:
    """Return the rows of a capacity factor; None: dropless.

    Raises ValueError for a factor that is not above 0 or is above 1e6.
    """
    return Dropless() if capacity_factor is None else Capacity(capacity_factor, filled)
