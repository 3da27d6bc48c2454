"""Gradients let rows go first: no piece begins while rows are in flight, so rows wait behind two
pieces at most."""

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scmoe.parallel.mesh import Mesh
from scmoe.parallel.update.pacing import IN_FLIGHT, Pacer, is_paced
from scmoe.parallel.update.wrap import SUMS_OF_A_UNIT, PacedScatter
from scmoe.parallel.wire import all_to_all
from scmoe.parallel.wire.dispatchers import Carried
from scmoe.parallel.wire.wire import Link

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

    def next(self) -> tuple[torch.Tensor, Sent]:
        return self.begun.get(timeout=10.0)

    def is_idle(self) -> bool:
        """Return whether no piece begins soon."""
        time.sleep(SOON_S)
        return self.begun.empty()


def test_rows_wait_behind_the_pieces_in_flight_alone():
    group, link = Group(), Link()
    pacer = Pacer(group, link, piece_mb=8 / 2**20)
    flat = torch.arange(10, dtype=torch.float32)  # five pieces
    done, later = pacer.start(flat), pacer.start(torch.zeros(2))
    in_flight = deque([group.next(), group.next()])
    rows, chunk = Sent(), Sent()
    Carried(lambda *_: (flat, rows), link)(flat, None)
    pieces = [in_flight.popleft(), in_flight.popleft()]
    for _, sent in pieces:
        sent.arrived.set()
    Carried(lambda *_: (flat, chunk), link)(
        flat, None
    )  # before the thread has looked again, or while it waits
    for transfer in (rows, chunk):
        assert group.is_idle(), "a piece began while rows were in flight"
        transfer.arrived.set()
    for _ in range(4):
        in_flight.append(group.next())
        if len(in_flight) == IN_FLIGHT:
            assert group.is_idle(), "more pieces are in flight than rows may wait for"
            in_flight[0][1].arrived.set()
            pieces.append(in_flight.popleft())
    assert torch.equal(torch.cat([numbers for numbers, _ in pieces]), flat) and done.wait() is flat
    assert not later.done()
    in_flight[0][1].arrived.set()
    later.wait()
    pacer.stop()


def test_an_error_reaches_whoever_waits_for_the_sum():
    pacer = Pacer(None, Link())
    with pytest.raises(AttributeError, match="allreduce"):
        pacer.start(torch.zeros(1)).wait()
    pacer.stop()


class Lost:
    def wait(self) -> None:
        raise RuntimeError("peer is gone")


def test_an_error_of_rows_reaches_both_that_wait_for_them():
    """The thread of the gradients waits for rows too, and backward must not go on without them."""
    posted: Future[list[Any]] = Future()
    posted.set_result([Lost()])
    rows = all_to_all.Posted(posted)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="peer is gone"):
            rows.wait()


def test_gradients_are_paced_where_the_host_decides_when_they_are_sent():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [is_paced(how, cpu) for how in (None, "paced", "ddp")] == [True, True, False]
    assert [is_paced(how, gpu) for how in (None, "ddp")] == [False, False]
    assert not is_paced(None, cpu, sparse=True)
    with pytest.raises(ValueError, match="reductions is 'paced', allowed on a GPU: 'ddp'"):
        is_paced("paced", gpu)
    with pytest.raises(ValueError, match=r"reductions is 'fast', allowed: ddp \| paced \| None"):
        is_paced("fast", cpu)


class Sums:
    """In place of a Pacer: sums that the test completes."""

    def __init__(self) -> None:
        self.started: list[torch.futures.Future[torch.Tensor]] = []

    def scatter(
        self, own: torch.Tensor, all_RN: torch.Tensor, group: Any
    ) -> torch.futures.Future[torch.Tensor]:
        self.started.append(torch.futures.Future())
        return self.started[-1]


def complete(sums: list[torch.futures.Future[torch.Tensor]]) -> None:
    time.sleep(SOON_S)
    for missing in sums:
        missing.set_result(torch.zeros(1))


def test_backward_of_split_weights_goes_on_until_one_units_sums_are_missing():
    group, sums = SimpleNamespace(size=lambda: 1), Sums()
    scatter = PacedScatter(sums, Mesh(), [])
    given = torch.zeros(1), torch.zeros(1), group, dist.ReduceOp.SUM
    with ThreadPoolExecutor() as pool:
        with scatter.during_backward():
            for _ in range(SUMS_OF_A_UNIT):
                scatter(*given)
            another = pool.submit(scatter, *given)
            time.sleep(SOON_S)
            assert len(sums.started) == SUMS_OF_A_UNIT and not another.done()
            sums.started[0].set_result(given[0])
            another.result(10.0)
            assert len(sums.started) == SUMS_OF_A_UNIT + 1
            later = pool.submit(complete, sums.started[1:])
        assert all(one.done() for one in sums.started), "backward ends with all sums"
        later.result(10.0)


@pytest.mark.parametrize("reader", ["an earlier batch", "rounding", "a hook"])
def test_sums_that_are_read_at_once_are_waited_for(reader):
    weight = torch.nn.Parameter(
        torch.zeros(1, dtype=torch.bfloat16 if reader == "rounding" else torch.float32)
    )
    if reader == "an earlier batch":
        weight.grad = torch.zeros(1)
    if reader == "a hook":
        weight.register_post_accumulate_grad_hook(lambda p: None)
    group, sums = SimpleNamespace(size=lambda: 1), Sums()
    scatter = PacedScatter(sums, Mesh(), [weight])
    with ThreadPoolExecutor() as pool, scatter.during_backward():
        one = pool.submit(scatter, weight, weight, group, dist.ReduceOp.SUM)
        deadline = time.monotonic() + 10
        while not sums.started and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(SOON_S)
        assert not one.done()
        sums.started[0].set_result(weight)
        one.result(10.0)
