"""A layout for dropless routing without host synchronisation: one buffer of fixed size for each rank.

The layout `filled` needs the numbers of rows on the host, and `slots` also computes empty rows. Here all rows for the
experts of one rank share that rank's buffer, in the order of its experts. Empty rows are sent but not computed. Shapes
do not depend on the data. Copies that do not fit are dropped: second choices first, then late tokens.

With P chunks every buffer is cut into P parts of equal size, so the number of chunks does not change what is dropped.
"""

import math

import torch
from torch import Tensor

from scmoe.moe.layout import Layout, count, invert, places, rounded_up


def buffer_size(num_tokens: int, top_k: int, num_ranks: int, ceiling: float) -> int:
    """Rows of a rank's buffer for num_tokens tokens: `ceiling` times the fair share, and no more than all of them."""
    return min(int(rounded_up(ceiling * num_tokens * top_k / num_ranks)), num_tokens * top_k)


def arrange_buffers(topk_ids_TK: Tensor, num_experts: int, num_ranks: int, size: int, num_chunks: int = 1) -> Layout:
    """Chooses a row in the buffer of its expert's rank for every copy. Expert id num_experts means none."""
    (T, K), E, P, device = topk_ids_TK.shape, num_experts, num_chunks, topk_ids_TK.device
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
