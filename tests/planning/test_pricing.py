"""Under uneven routing a transfer has the price of its slowest rank, and the hidden share stays
between 0 and 1.

Ranks are played by formula. Rank 0 has `load` times its fair share of the rows. A rank is done with
a transfer when its own rows have arrived, whatever its peers wait for, as with gloo. Each rank has
a clock of its own.
"""

from unittest.mock import patch

import pytest
import torch

from scmoe.moe.operators import Direction
from scmoe.moe.recorder import Mark, Recorder
from scmoe.planning import pricing
from scmoe.planning.choice import LayerChoice
from scmoe.planning.planner import hidden_part
from scmoe.planning.pricing import (
    DIRECTIONS,
    OPERATORS,
    Sample,
    choice_at_slot,
    measured,
    noted,
    price,
    slot_key,
)
from scmoe.schedule.cost import slots
from scmoe.schedule.play import TRANSFERS
from scmoe.schedule.schedule import Schedule

MS = {
    "attention": 60.0,
    "attention_core": 48.0,
    "attention_out": 12.0,
    "mlp": 20.0,
    "shared_expert": 20.0,
    "experts": 20.0,
    "route": 1.0,
    "encode": 1.0,
    "decode": 1.0,
}
TRANSFER = 50.0  # ms, of even rows
SKEW = pytest.mark.parametrize(
    ("ranks", "load"), [(r, load) for r in (2, 4) for load in (1.0, 1.3, 1.7)]
)
PAIRS = [
    Schedule("scmoe", "pos2", 1),
    Schedule("scmoe", "pos3", 2),
    Schedule("scmoe", "pos2", 1, chunks=2),
]
PAIRS.append(Schedule("scmoe", "pos2", 1, inside_attention=True))


def step(
    schedule: Schedule,
    ranks: int,
    load: float,
    sequential: bool,
    transfer: float = TRANSFER,
    start: float = 0.0,
) -> list[Recorder]:
    """Return the recorder of each rank after a training step. Where transfers overlap, their marks
    are only around the launch, as in a run."""
    recorders = [Recorder(torch.device("cpu")) for _ in range(ranks)]
    for rank, recorder in enumerate(recorders):
        recorder.zero = 1e3 * rank
    clock = [start] * ranks
    for direction in DIRECTIONS:
        clock = play(recorders, schedule, direction, load, sequential, transfer, clock)
    return recorders


def play(
    recorders: list[Recorder],
    schedule: Schedule,
    direction: Direction,
    load: float,
    sequential: bool,
    transfer: float,
    clock: list[float],
) -> list[float]:
    """Note the marks of one direction, from these times of the ranks on, in ms. Return when each
    rank is done."""
    ranks, chunks = len(recorders), schedule.chunks
    # that go to each rank, of those of a rank
    rows = [load / ranks] + [(1 - load / ranks) / (ranks - 1)] * (ranks - 1)
    # that a rank's link brings
    to_experts, back = ([(ranks - 1) * own for own in rows], [1 - own for own in rows])
    operators, last, factor = schedule.operators(), "decode", 1
    if direction == "backward":
        operators, last, factor = schedule.backward_operators(), "encode", 2
    first = next(op for op in operators if op in TRANSFERS)
    link, arrived, arrivals = 0.0, clock, []
    for op in operators:
        if op in ("experts", last):
            clock = list(map(max, clock, arrivals.pop(0) if op == "experts" else arrived))
        begin = clock
        if op in TRANSFERS:
            brought, leave_hot = (to_experts, back[0]) if op == first else (back, to_experts[0])
            needed = [max(own, leave_hot) if rank else own for rank, own in enumerate(brought)]
            launched = max(link, *clock)
            arrived = [launched + transfer * n * ranks / (ranks - 1) / chunks for n in needed]
            link = max(arrived)
            if op == first:
                arrivals.append(arrived)
            if sequential:
                clock = arrived
        else:
            of_ranks = [own * ranks / chunks for own in rows] if op == "experts" else [1.0] * ranks
            clock = [at + factor * MS[op] * own for at, own in zip(clock, of_ranks, strict=True)]
        for recorder, *edges in zip(recorders, begin, clock, strict=True):
            marks = zip((True, False), edges, strict=True)
            recorder.marks += [
                Mark(op, direction, begins, recorder.zero + at / 1e3) for begins, at in marks
            ]
    return clock


def seconds(recorders: list[Recorder], schedule: Schedule, ep_size: int | None = None) -> Sample:
    """Return what `measured` returns on every one of these ranks."""
    of_ranks = torch.stack([noted(recorder, schedule, DIRECTIONS) for recorder in recorders])
    with patch.object(pricing, "gather", lambda own, group: of_ranks):
        return measured([recorders[0]], [schedule], None, ep_size)


def priced(schedule: Schedule, ranks: int, load: float) -> LayerChoice:
    sample = seconds(step(schedule, ranks, load, sequential=True), schedule)
    priced = price({schedule.chunks: [sample] * 3}, [schedule], fixed=True)
    return priced[schedule.chunks][0].layers[0]


@SKEW
@pytest.mark.parametrize("schedule", PAIRS, ids=str)
def test_prices_are_those_of_the_slowest_rank(schedule, ranks, load):
    """Backward computes twice as long and sends the same rows."""
    choice = priced(schedule, ranks, load)
    times = choice.times[schedule.chunks]
    for own, factor, whole, free in zip(
        (times.forward, times.backward), (1, 2), choice.sequential, choice.free, strict=True
    ):
        assert own["dispatch"] == pytest.approx(load * TRANSFER / 1e3)
        assert own["combine"] == pytest.approx(load * TRANSFER / 1e3)
        assert own["experts"] == pytest.approx(factor * load * MS["experts"] / 1e3)
        assert own["attention"] == pytest.approx(factor * MS["attention"] / 1e3)
        assert whole - free == pytest.approx(2 * load * TRANSFER / 1e3)
        computing = (
            sum(MS[op] for op in (*schedule.window, "route", "encode", "decode"))
            + load * MS["experts"]
        )
        assert free == pytest.approx(factor * computing / 1e3)


@SKEW
@pytest.mark.parametrize("schedule", PAIRS, ids=str)
def test_the_hidden_share_is_that_of_the_slowest_rank(schedule, ranks, load):
    """Compared with steps that are timed as a whole: sequential, overlapped, and with free
    transfers. With chunks, the busiest rank hides some of its experts behind the way back of the
    chunk before even in a sequential step.
    """
    choice, ways = priced(schedule, ranks, load), ((True, TRANSFER), (False, TRANSFER), (True, 0.0))
    sequential, overlapped, free = (step(schedule, ranks, load, *way) for way in ways)
    for d, direction in enumerate(DIRECTIONS):
        whole = [
            max(r.spans(direction)[-1].end for r in way) for way in (overlapped, sequential, free)
        ]
        begun = [
            max(r.spans(direction)[0].start for r in way) for way in (overlapped, sequential, free)
        ]
        true = hidden_part(*(end - start for end, start in zip(whole, begun, strict=True)))
        found = hidden_part(
            float(seconds(overlapped, schedule).elapsed_d[0, d]),
            choice.sequential[d],
            choice.free[d],
        )
        assert true is not None and found == pytest.approx(
            true, abs=0.01 if schedule.chunks == 1 else 0.05
        )
        assert 0 <= found <= 1.05


def test_even_prices_are_those_of_any_rank():
    schedule = Schedule("scmoe", "pos2", 1, chunks=2)
    recorders = step(schedule, 4, 1.0, sequential=True)
    for recorder in recorders:
        of_one, of_all = seconds([recorder], schedule), seconds(recorders, schedule)
        for one, every in zip(of_one, of_all, strict=True):
            assert torch.allclose(one, every, rtol=1e-9)


def test_each_ep_group_has_prices_of_its_own_and_their_mean_counts():
    """The second group begins a second later."""
    schedule = Schedule("scmoe", "pos2", 1)
    recorders = step(schedule, 2, 1.7, sequential=True) + step(
        schedule, 2, 1.0, sequential=True, start=1e3
    )
    (operators_dO,) = seconds(recorders, schedule, ep_size=2).operators_dO
    dispatch = operators_dO[:, OPERATORS.index("dispatch")]
    assert dispatch.tolist() == pytest.approx([1.35 * TRANSFER / 1e3] * 2)


@pytest.mark.parametrize(
    ("overlapped", "part"),
    [(15.0, 0.5), (20.2, 0.0), (9.8, 1.02), (40.0, None), (200.0, None), (8.0, None)],
)
def test_a_disturbed_step_has_no_hidden_part(overlapped, part):
    assert hidden_part(overlapped, sequential=20.0, free=10.0) == (
        part if part is None else pytest.approx(part)
    )


def test_layers_with_different_windows_share_a_slot_and_not_an_index():
    """Slots inside attention stand at different indices of the two windows."""
    short, long = (
        [LayerChoice(schedule, {}, ()) for schedule in slots(Schedule("scmoe", position))]
        for position in ("pos1", "pos2")
    )
    assert [slot_key(choice_at_slot(short, slot_key(choice))) for choice in long] == [
        (0, False),
        (1, False),
        (1, False),  # no attention follows there
        (2, False),
        (2, False),
    ]
    assert slot_key(choice_at_slot(long, (0, True))) == (0, False)
