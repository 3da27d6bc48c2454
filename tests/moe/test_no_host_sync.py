"""With fixed capacity, a block's forward and backward pass never read a number of the device on the
host.

The tests need no device: tensors on `meta` have shapes but no numbers, so code that reads a number
raises. They take the code paths of a device (moe/experts.py). test_cuda.py does the same on a GPU.
"""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from scmoe.moe.dispatcher import ChunkCounts, Dispatcher, LocalDispatcher, Ready, Traffic
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Buffers, Capacity, Dropless, Rows
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher, buffer_for
from scmoe.parallel.wire.announced import ReadByHost
from scmoe.schedule.schedule import Schedule
from tests.support.models import DIM, EXPERTS, FFN, tiny_shortcut


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Disable autocast, which does not support the device `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


def sent(rows: torch.Tensor, traffic: Traffic | None) -> tuple[torch.Tensor, Ready]:
    """Return the exchange of meta rows, of equal or of announced numbers."""
    return buffer_for(rows, traffic), Ready(rows)


def two_ranks(buffered: bool = False) -> AllToAllDispatcher:
    """Return the dispatcher of one of two ranks."""
    with patch.object(dist, "get_world_size", return_value=2):
        return AllToAllDispatcher(None, EXPERTS, exchange=sent, buffered=buffered)


def run(
    dispatcher: Dispatcher,
    schedule: Schedule,
    rows: Rows,
    masked: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Run forward and backward of a ScMoE pair, the losses on the routing included."""
    experts = range(EXPERTS // 2 if isinstance(dispatcher, AllToAllDispatcher) else EXPERTS)
    stream = MoEStream(
        Router(DIM, EXPERTS, 2), Experts(DIM, FFN, EXPERTS, experts), dispatcher, rows
    )
    block = tiny_shortcut(stream, schedule).to("meta", dtype)
    x = torch.empty(2, 12, DIM, device="meta", dtype=dtype, requires_grad=True)
    y, stats = block(x, torch.empty(2, 12, dtype=torch.bool, device="meta") if masked else None)
    assert stats is not None and stats.counts_E.shape == (EXPERTS,)
    (y.square().mean() + stats.score_sums_E.sum() + stats.z_sum).backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize(
    "schedule",
    [Schedule("scmoe", p, chunks=c) for p in ("pos1", "pos2", "pos3") for c in (1, 3)],
    ids=str,
)
@pytest.mark.parametrize("ranks", (1, 2))
def test_forward_and_backward_ask_the_host_for_nothing(ranks, schedule, masked):
    run(
        LocalDispatcher() if ranks == 1 else two_ranks(),
        schedule,
        Capacity(1.25),
        masked,
        torch.float32,
    )


# ---------------------------------------------------------------------- dropless on two ranks


def on_two_ranks(chunks: int, rows: Rows) -> None:
    schedule = Schedule("scmoe", "pos2", chunks=chunks)
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    with (
        patch.object(dist, gather, return_value=Ready(None)),
        patch.object(dist, "get_rank", return_value=0),
    ):
        run(two_ranks(isinstance(rows, Buffers)), schedule, rows)


@pytest.mark.parametrize("chunks", (1, 3))
def test_dropless_waits_for_the_device_once_a_layer(chunks, monkeypatch):
    """docs/decisions/0024-dropless.md has the list: with this one wait answered, nothing else asks
    the host."""
    reads, n = [], 24 // chunks

    def known_counts(announced: ReadByHost) -> list[ChunkCounts]:
        """Half of the 48 copies go to each rank, in equal chunks."""
        reads.append(announced)
        traffic = Traffic((n, n), (n, n))
        return [ChunkCounts(2 * n, announced.by_rank[:, p, 0], traffic) for p in range(chunks)]

    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        on_two_ranks(chunks, Dropless())
    monkeypatch.setattr(ReadByHost, "wait", known_counts)
    on_two_ranks(chunks, Dropless())
    assert len(reads) == 1


@pytest.mark.parametrize("chunks", (1, 3))
def test_buffers_ask_the_host_for_nothing(chunks):
    on_two_ranks(chunks, Buffers(1.5))


def test_dropless_on_one_rank_asks_the_host_for_nothing():
    """Every copy has a row, so the number of rows is known without the counts."""
    run(LocalDispatcher(), Schedule("scmoe", "pos2"), Dropless())


def test_a_request_to_the_host_is_detected():
    """Padding and several chunks make dropless ask for numbers of rows."""
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run(LocalDispatcher(), Schedule("scmoe", "pos2"), Dropless(), masked=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        run(LocalDispatcher(), Schedule("scmoe", "pos2", chunks=2), Dropless())
