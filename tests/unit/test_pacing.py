"""Gradients let rows go first: no piece begins while rows are in flight, so rows wait behind one piece at most."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest
import torch

from scmoe.parallel.all_to_all import Link
from scmoe.parallel.update.pacing import Pacer, is_paced

SOON_S = 0.05  # in which a piece would begin that does not wait; the thread needs less than 1 ms


class Sent:
    """A transfer that the test completes."""

    def __init__(self) -> None:
        self.arrived = threading.Event()

    def wait(self) -> None:
        assert self.arrived.wait(10.0)


class Group:
    """A process group of one rank, whose pieces the test sees begin and completes."""

    def __init__(self) -> None:
        self.begun: SimpleQueue[tuple[torch.Tensor, Sent]] = SimpleQueue()

    def allreduce(self, tensors: list[torch.Tensor]) -> Sent:
        self.begun.put((tensors[0], sent := Sent()))
        return sent


def test_rows_wait_behind_one_piece_at_most():
    group, link = Group(), Link()
    pacer = Pacer(group, link, piece_mb=8 / 2**20)
    flat = torch.arange(10, dtype=torch.float32)  # five pieces
    done = pacer.start(flat)
    later = pacer.start(torch.zeros(2))
    first, sent = group.begun.get(timeout=10.0)
    rows, chunk = Sent(), Sent()
    exchange = link.carrying(lambda *_: (flat, rows))
    exchange(flat, [], [])  # behind the first piece
    sent.arrived.set()
    threading.Timer(SOON_S / 2, lambda: link.carrying(lambda *_: (flat, chunk))(flat, [], [])).start()
    threading.Event().wait(SOON_S)
    rows.arrived.set()
    threading.Event().wait(SOON_S)
    assert group.begun.empty(), "a piece began while rows were in flight"
    chunk.arrived.set()
    pieces = [first]
    for _ in range(4):
        piece, sent = group.begun.get(timeout=10.0)
        threading.Event().wait(SOON_S / 10)
        assert group.begun.empty() and not done.done(), "one piece is sent at a time"
        sent.arrived.set()
        pieces.append(piece)
    assert torch.equal(torch.cat(pieces), flat) and done.wait() is flat
    group.begun.get(timeout=10.0)[1].arrived.set()
    later.wait()
    pacer.stop()


def test_an_error_reaches_whoever_waits_for_the_sum():
    pacer = Pacer(None, Link())
    with pytest.raises(AttributeError, match="allreduce"):
        pacer.start(torch.zeros(1)).wait()
    pacer.stop()


def test_gradients_are_paced_where_the_host_decides_when_they_are_sent():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [is_paced(how, cpu) for how in (None, "paced", "ddp")] == [True, True, False]
    assert [is_paced(how, gpu) for how in (None, "ddp")] == [False, False]
    with pytest.raises(ValueError, match="reductions is 'paced', allowed on a GPU: 'ddp'"):
        is_paced("paced", gpu)
    with pytest.raises(ValueError, match=r"reductions is 'fast', allowed: ddp \| paced \| None"):
        is_paced("fast", cpu)
