"""The least time of an iteration whose links carry rows and gradients, and what they carry."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from experiments.bench.overlap.rounds import Measurement, block_seconds
from experiments.bench.setting import Setting, share_sent
from scmoe.loads import BALANCED

PAYLOAD = 1448 / 1514  # of what a link carries; the rest is headers of TCP, IP and Ethernet


def has_limit(measured: Measurement) -> bool:
    """Return whether an iteration's limit is known.

    An iteration has gradients, so it requires the rate of the links, and even rows.
    """
    setting = measured.setting
    on_links = setting.links == "shaped"
    return setting.level == "iteration" and on_links and measured.load == BALANCED


def gradient_mb(measured: Measurement, block: str) -> float:
    return sum(size for _, size in measured.gradients[block]) / 2**20


def row_bytes(setting: Setting, block: str) -> float:
    """Return the bytes of rows that leave by a link in one direction of one batch: two transfers of
    each MoE. One rank alone, on a GPU, counts as two, as in setting.tokens_for."""
    top_k = setting.top_k_of(block)
    copies = setting.moe_blocks * top_k * setting.tokens
    rows = 2 * copies * setting.rows_per_copy(top_k) * share_sent(max(2, setting.ranks))
    return rows * setting.dim * getattr(torch, setting.dtype).itemsize


def rows_over_gradients(measured: Measurement, block: str) -> float:
    """Return the bytes of rows over the bytes of gradients that a rank sends in one training step,
    the latter by a ring of all ranks."""
    setting = measured.setting
    gradients = 2 * share_sent(max(2, setting.ranks)) * gradient_mb(measured, block) * 2**20
    return 2 * setting.accumulate * row_bytes(setting, block) / gradients


def in_parallel(computation: float, transfers: Iterable[tuple[float, float]]) -> float:
    """Return the shortest time in which a computation and all transfers can end; the transfers take
    turns on one link.

    transfers: for each, its earliest start, counted from the start of the computation, and its
    duration.
    """
    end, after = computation, 0.0
    for ready, duration in sorted(transfers, reverse=True):
        after += duration  # the link carries all of this after `ready`
        end = max(end, ready + after)
    return end


def least_time(
    forward: float,
    backward: float,
    update: float,
    rows: float,
    gradients: Iterable[tuple[float, float]],
) -> float:
    """Return a lower bound on the time of an iteration whose links also carry gradients: only waits
    that cannot be avoided count. A transfer of rows can start at any time of its direction, and all
    computation of this direction can hide it; a gradient can be sent when it is computed; the
    update needs all of them.

    forward, backward, update: computation alone. rows: time of the transfers of a direction.
    gradients: when in backward each can start, and how long its sum over the ranks takes."""
    return max(forward, rows) + in_parallel(backward, [(0.0, rows), *gradients]) + update


def least_times(measured: Measurement, block: str) -> Any:
    """Return the least time of an iteration in each round, from its times without transfers. A ring
    sends 2 (ranks - 1) / ranks of the gradients' bytes, all of them beside the last batch's
    backward."""
    assert measured.rate is not None
    setting = measured.setting
    alone, batches = block_seconds(measured, block, "alone"), setting.accumulate
    bytes_per_s = measured.rate * 1e6 / 8 * PAYLOAD
    rows = row_bytes(setting, block) / bytes_per_s
    sums = [
        (part, 2 * share_sent(setting.ranks) * size / bytes_per_s)
        for part, size in measured.gradients[block]
    ]
    forward, backward = alone.train_forward / batches, (alone.backward - alone.update) / batches
    least = []
    for f, b, update in zip(forward, backward, alone.update, strict=True):
        before = (batches - 1) * least_time(f, b, 0.0, rows, [])
        least.append(before + least_time(f, b, update, rows, [(part * b, s) for part, s in sums]))
    return np.asarray(least)
