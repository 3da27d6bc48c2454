"""The schedule is a value, and the blocks execute it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import scmoe.moe.stream
from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.farskip import FarSkipBlock
from scmoe.blocks.standard import SharedExpertBlock, TopKBlock
from scmoe.blocks.sublayers import MLP, compile_sublayers
from scmoe.moe.coefficient import CG1
from scmoe.schedule.cost import slots
from scmoe.schedule.play import TRANSFERS
from scmoe.schedule.schedule import POSITIONS_OF, SUBLAYERS, Schedule
from tests.support.models import DIM, FFN, tiny_shortcut, tiny_stream, tiny_sublayers
from tests.support.recording import Log, Recorded, RecordingDispatcher

EVERY_WINDOW = [
    Schedule(name, position) for name, each in POSITIONS_OF.items() for position in each or (None,)
]
EVERY_SLOT = [schedule for window in EVERY_WINDOW for schedule in slots(window)]


def test_windows_are_the_papers():
    """Section 3.1: Pos-1 T_attn + T_SE, Pos-2 T_attn + T_SE + T_MLP, Pos-3 2 T_attn + T_SE + T_MLP.
    The last are not the paper's."""
    windows = {s.name: sorted(s.window) for s in EVERY_WINDOW}
    assert windows == {
        "top_k": [],
        "shared_expert": ["shared_expert"],
        "scmoe pos1": ["attention", "shared_expert"],
        "scmoe pos2": ["attention", "mlp", "shared_expert"],
        "scmoe pos3": ["attention", "attention", "mlp", "shared_expert"],
        "scmoe carried": ["attention", "shared_expert"],
        "scmoe first": ["shared_expert"],
        "farskip": ["attention", "shared_expert"],
        "dgmoe pos1": ["attention"],
        "dgmoe pos2": ["attention", "mlp"],
        "dgmoe pos3": ["attention", "attention", "mlp"],
    }
    every = [slots(Schedule("scmoe", p)) for p in ("pos1", "pos2", "pos3")]
    assert [sum(not s.inside_attention for s in own) for own in every] == [3, 4, 5]  # section 3.2
    assert [len(own) for own in every] == [4, 5, 7]


def test_a_window_holds_the_sublayers_after_the_tap_in_their_order():
    for schedule in EVERY_WINDOW:
        before_tap = SUBLAYERS[: 3 - schedule.sublayers_after_tap]
        assert (
            *before_tap,
            *(name for name in schedule.window if name != "shared_expert"),
        ) == SUBLAYERS, schedule


def test_operators_by_hand():
    assert Schedule("scmoe", "pos2", 1, 2).operators() == (
        *("route", "encode", "dispatch", "dispatch", "mlp"),
        *("experts", "combine", "experts", "combine"),
        *("attention", "shared_expert", "decode"),
    )
    assert Schedule("scmoe", "pos2", 1, 2).backward_operators() == (
        *("decode", "combine", "combine", "shared_expert", "attention"),
        *("experts", "dispatch", "experts", "dispatch"),
        *("mlp", "encode", "route"),
    )
    inside = Schedule("scmoe", "pos2", 1, inside_attention=True)
    assert inside.operators() == (
        *("route", "encode", "dispatch", "mlp", "attention_core", "experts", "combine"),
        *("attention_out", "shared_expert", "decode"),
    )
    assert inside.backward_operators() == (
        *("decode", "combine", "shared_expert", "attention_out", "experts", "dispatch"),
        *("attention_core", "mlp", "encode", "route"),
    )
    assert Schedule("top_k").operators() == (
        "route",
        "encode",
        "dispatch",
        "experts",
        "combine",
        "decode",
    )


def test_every_slot_has_the_same_operators_in_the_backbones_order():
    for schedule in EVERY_SLOT:
        schedule = replace(schedule, chunks=3)
        # the two parts of an attention as one, where its output projection is
        operators = [
            "attention" if o == "attention_out" else o
            for o in schedule.operators()
            if o != "attention_core"
        ]
        assert sorted(operators) == sorted(
            replace(schedule, expert_slot=0, inside_attention=False).operators()
        )
        assert tuple(o for o in operators if o in schedule.window) == schedule.window, schedule


def test_backward_computes_in_the_reverse_order_of_forward():
    for schedule in EVERY_SLOT:
        both = schedule.operators(), schedule.backward_operators()
        forward, backward = ([op for op in own if op not in TRANSFERS] for own in both)
        assert backward == forward[::-1], schedule


def test_default_slot_is_the_middle():
    middle = {"scmoe pos1": 1, "scmoe pos2": 1, "scmoe pos3": 2, "shared_expert": 0, "top_k": 0}
    assert {s.name: s.slot for s in EVERY_WINDOW if s.name in middle} == middle
    assert Schedule("scmoe", "pos2") == Schedule("scmoe", "pos2", 1)
    inside = [
        Schedule("scmoe", position, inside_attention=True).slot
        for position in ("pos1", "pos2", "pos3")
    ]
    assert inside == [0, 1, 2]  # the last attention


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pos2",), "architecture is 'pos2', allowed: top_k, shared_expert, scmoe, dgmoe"),
        (
            ("scmoe", "pos4"),
            "position is 'pos4', allowed for scmoe: pos1, pos2, pos3, carried, first",
        ),
        (("scmoe",), "position is None, allowed for scmoe: pos1, pos2, pos3, carried, first"),
        (("farskip", "pos1"), "position is 'pos1', allowed for farskip: None"),
        (("farskip", None, 3), r"schedule.slot is 3, allowed for farskip: 0\.\.2"),
        (("top_k", "pos1"), "position is 'pos1', allowed for top_k: None"),
        (("scmoe", "pos2", 4), r"schedule.slot is 4, allowed for scmoe pos2: 0\.\.3"),
        (("scmoe", "pos1", -1), r"schedule.slot is -1, allowed for scmoe pos1: 0\.\.2"),
        (("dgmoe", "pos3", 4), r"schedule.slot is 4, allowed for dgmoe pos3: 0\.\.3"),
        (("top_k", None, 1), r"schedule.slot is 1, allowed for top_k: 0\.\.0"),
        (
            ("scmoe", "pos2", 0, 1, True),
            "schedule.slot is 0, allowed for scmoe pos2 with schedule.inside_attention: 1,",
        ),
        (
            ("scmoe", "first", 0, 1, True),
            "inside_attention is True, allowed for scmoe first: False",
        ),
        (("scmoe", "pos2", 1, 0), "chunks is 0, allowed: 1 or more"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_impossible_blocks_are_refused():
    norm, tap_norm, twice = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Schedule("dgmoe", "pos2")
    too_few = "pos2 requires 2 or more sub-layers"
    with pytest.raises(ValueError, match=too_few):
        tiny_shortcut(tiny_stream(), Schedule("scmoe", "pos2"), tiny_sublayers()[:1])
    with pytest.raises(ValueError, match=too_few):
        DoubleGateBlock(tiny_sublayers()[:1], norm, tiny_stream(1), twice, tap_norm=tap_norm)
    with pytest.raises(ValueError, match="top_k is 2, allowed where an MoE module gates twice: 1"):
        DoubleGateBlock(tiny_sublayers(), norm, tiny_stream(2), twice, tap_norm=tap_norm)


def test_experts_run_inside_an_attention_that_has_two_parts_only():
    inside = Schedule("scmoe", "pos1", inside_attention=True)
    whole_only = [*tiny_sublayers()[:2], nn.Sequential(tiny_sublayers()[2])]
    with pytest.raises(ValueError, match=r"inside_attention is True, .* Sequential"):
        tiny_shortcut(tiny_stream(), inside, whole_only)
    block = tiny_shortcut(tiny_stream(), Schedule("scmoe", "pos1"), whole_only)
    assert block.divided == block.schedule
    compiled = tiny_shortcut(tiny_stream(), Schedule("scmoe", "pos1"))
    assert compiled.divided.inside_attention
    # a planner would measure attention without its graph, and round otherwise
    compile_sublayers(compiled)
    assert compiled.divided == compiled.schedule
    with pytest.raises(ValueError, match=r"inside_attention is True, .* Sequential"):
        block.run_as(inside, block.moe.dispatcher)


@pytest.mark.parametrize(("position", "carry"), [("carried", None), ("pos1", 0)])
def test_a_tap_in_the_preceding_block_must_be_handed_on(position, carry):
    block = tiny_shortcut(tiny_stream(), Schedule("scmoe", position)).double()
    with pytest.raises(ValueError, match=f"scmoe {position} .*carry"):
        block(torch.zeros(1, 2, DIM, dtype=torch.float64), carry=carry)


# The order in which the blocks run


def executed(schedule: Schedule, capacity_factor: float | None, monkeypatch) -> tuple[str, ...]:
    """Return the operators in the order in which a block starts them, from the tap on. "current"
    of dgmoe is its second MoE module."""
    log = Log()

    def logged(f, name: str):
        return lambda *args: (log.forward.append(f"{name} begin"), f(*args))[1]

    for name in ("encode", "decode"):
        monkeypatch.setattr(scmoe.moe.stream, name, logged(getattr(scmoe.moe.stream, name), name))
    stream = tiny_stream(
        1 if schedule.architecture == "dgmoe" else 2, capacity_factor, RecordingDispatcher(log)
    )
    stream.router.register_forward_pre_hook(lambda *_: log.forward.append("route begin"))
    stream.experts = Recorded("experts", stream.experts, log)
    sublayers = [Recorded(*part, log) for part in zip(SUBLAYERS, tiny_sublayers(), strict=True)]
    norm, shared_expert = nn.LayerNorm(DIM), Recorded("shared_expert", MLP(DIM, FFN), log)
    if schedule.architecture == "top_k":
        block = TopKBlock(sublayers, norm, stream, schedule)
    elif schedule.architecture == "shared_expert":
        block = SharedExpertBlock(
            sublayers, norm, stream, schedule, shared_expert=shared_expert, coefficient=CG1(DIM)
        )
    elif schedule.architecture == "dgmoe":
        block = DoubleGateBlock(sublayers, norm, stream, schedule, tap_norm=nn.LayerNorm(DIM))
    elif schedule.architecture == "farskip":
        block = FarSkipBlock(sublayers[2:], norm, stream, schedule, shared_expert=shared_expert)
    else:
        block = tiny_shortcut(stream, schedule, sublayers, shared_expert)
    x_BSD = torch.randn(2, 5, DIM, dtype=torch.float64)
    carried = {"carry": x_BSD} if schedule.position == "carried" else {}
    block.double()(x_BSD, **carried)
    operators = [name.split()[0] for name in log.forward if name.endswith((" begin", " start"))]
    before_tap = 0 if schedule.architecture == "farskip" else 3 - schedule.sublayers_after_tap
    assert operators[:before_tap] == [*SUBLAYERS[:before_tap]]
    return tuple(operators[before_tap:])


@pytest.mark.parametrize("capacity_factor", (None, 2.0), ids=("dropless", "capacity"))
@pytest.mark.parametrize("chunks", (1, 3))
def test_blocks_execute_the_operators_of_their_schedule(chunks, capacity_factor):
    for schedule in [replace(schedule, chunks=chunks) for schedule in EVERY_SLOT]:
        expected = schedule.operators()
        if "current" in expected:  # the second module runs before the first one's decode
            *before, _, decode = expected
            expected = (*before, *Schedule("top_k", chunks=chunks).operators(), decode)
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert executed(schedule, capacity_factor, monkeypatch) == expected, schedule
