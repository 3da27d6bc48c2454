"""The local dispatcher sends nothing, and the sequential baseline waits for each transfer and
changes no bit."""

import pytest
import torch

from scmoe.moe.dispatcher import Blocking, LocalDispatcher, Narrowed
from tests.support.models import DIM, tiny_stream
from tests.support.recording import Log, RecordingDispatcher


@pytest.mark.parametrize(
    "dispatcher", (LocalDispatcher(), Blocking(LocalDispatcher())), ids=("local", "blocking")
)
@pytest.mark.parametrize("counts", (None, torch.tensor([2, 0, 4])), ids=("equal", "counted"))
def test_one_rank_sends_nothing(dispatcher, counts):
    rows = torch.randn(6, DIM, requires_grad=True)
    announced = None if counts is None else dispatcher.announce(counts[None]).wait()[0]
    pending, receipt = dispatcher.dispatch(rows, announced)
    assert pending.wait() is rows
    assert receipt.num_tokens_per_expert_e is counts or torch.equal(
        receipt.num_tokens_per_expert_e, counts
    )
    assert dispatcher.combine(rows, receipt).wait() is rows


def recorded(blocking: bool) -> tuple[list[str], list[str]]:
    log = Log()
    dispatcher = RecordingDispatcher(log)
    stream = tiny_stream(dispatcher=Blocking(dispatcher) if blocking else dispatcher)
    x = torch.randn(
        1,
        12,
        DIM,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
        requires_grad=True,
    )
    stream(x, None, 2).y_BSD.sum().backward()
    return log.forward, log.backward


def test_all_chunks_are_sent_before_the_first_is_awaited():
    forward, backward = recorded(blocking=False)
    assert forward == [
        *("dispatch 0 start", "dispatch 1 start"),
        *("dispatch 0 wait", "combine 0 start"),
        *("dispatch 1 wait", "combine 1 start"),
        *("combine 0 wait", "combine 1 wait"),
    ]
    assert backward == forward[::-1]


def test_blocking_waits_at_once_forward_and_backward():
    forward, backward = recorded(blocking=True)
    transfers = "dispatch 0", "dispatch 1", "combine 0", "combine 1"
    assert forward == [
        f"{transfer} {event}" for transfer in transfers for event in ("start", "wait")
    ]
    # each gradient's start ("wait") and arrival ("start") are neighbours
    assert backward == forward[::-1]


def test_narrowed_rows_travel_in_their_type_and_are_rounded_once_each_way():
    class Seen(LocalDispatcher):
        def dispatch(self, rows_RD, counts):
            assert rows_RD.dtype == torch.bfloat16
            return super().dispatch(rows_RD, counts)

        def combine(self, rows_RD, receipt):
            assert rows_RD.dtype == torch.bfloat16
            return super().combine(rows_RD, receipt)

    rows = torch.randn(6, DIM, requires_grad=True)
    dispatcher = Narrowed(Seen(), torch.bfloat16)
    pending, receipt = dispatcher.dispatch(rows, None)
    arrived = pending.wait()
    assert torch.equal(arrived, rows.bfloat16().float()) and arrived.dtype == torch.float32
    factor = torch.randn(6, DIM)
    (dispatcher.combine(arrived, receipt).wait() * factor).sum().backward()
    assert torch.equal(rows.grad, factor.bfloat16().float())
