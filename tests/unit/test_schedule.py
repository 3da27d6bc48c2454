"""The schedule as a value, and that the blocks do what it says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

import scmoe.moe.stream
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import SharedExpertBlock, TopKBlock
from scmoe.blocks.sublayers import MLP
from scmoe.moe.coefficient import CG1
from scmoe.moe.dispatcher import LocalDispatcher
from scmoe.schedule.schedule import WINDOWS, Schedule
from tests.support.models import DIM, FFN, tiny_stream, tiny_sublayers

SLOTS = [(position, slot) for position, window in WINDOWS.items() for slot in range(len(window) + 1)]
WITHOUT_DGMOE = [(p, s) for p, s in SLOTS if not p.startswith("dgmoe")]  # test_double_gate.py has its own


def test_windows_are_the_papers():
    """Section 3.1: Pos-1 T_attn + T_SE, Pos-2 T_attn + T_SE + T_MLP, Pos-3 2 T_attn + T_SE + T_MLP."""
    window = {position: sorted(names) for position, names in WINDOWS.items()}
    assert window["pos1"] == ["attention", "shared_expert"]
    assert window["pos2"] == ["attention", "mlp", "shared_expert"]
    assert window["pos3"] == ["attention", "attention", "mlp", "shared_expert"]
    assert [len(WINDOWS[p]) + 1 for p in ("pos1", "pos2", "pos3")] == [3, 4, 5]  # slots, section 3.2


def test_operators_by_hand():
    assert Schedule("pos2", 1, 2).operators() == (
        *("route", "encode", "dispatch", "dispatch", "mlp"),
        *("experts", "combine", "experts", "combine"),
        *("attention", "shared_expert", "decode"),
    )
    assert Schedule("pos2", 1, 2).backward_operators() == (
        *("decode", "combine", "combine", "shared_expert", "attention"),
        *("experts", "dispatch", "experts", "dispatch"),
        *("mlp", "encode", "route"),
    )
    assert Schedule("top_k").operators() == ("route", "encode", "dispatch", "experts", "combine", "decode")


@pytest.mark.parametrize(("position", "slot"), SLOTS)
def test_every_slot_has_the_same_operators_in_the_backbones_order(position, slot):
    operators, first = Schedule(position, slot, 3).operators(), Schedule(position, 0, 3).operators()
    assert sorted(operators) == sorted(first)
    assert tuple(o for o in operators if o in WINDOWS[position]) == WINDOWS[position]


def test_default_slot_is_the_middle():
    middle = {"pos1": 1, "pos2": 1, "pos3": 2, "shared_expert": 0, "top_k": 0}
    assert {position: Schedule(position).slot for position in middle} == middle


def test_is_a_value():
    assert Schedule("pos2", 1) == Schedule("pos2", None) and hash(Schedule("pos2", 1)) == hash(Schedule("pos2", None))
    with pytest.raises(FrozenInstanceError):
        Schedule("pos2").chunks = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pos4",), "position is 'pos4', allowed: pos1, pos2, pos3"),
        (("pos2", 4), r"schedule.slot is 4, allowed for pos2: 0\.\.3"),
        (("pos1", -1), r"schedule.slot is -1, allowed for pos1: 0\.\.2"),
        (("top_k", 1), r"schedule.slot is 1, allowed for top_k: 0\.\.0"),
        (("pos2", 1, 0), "chunks is 0, allowed: 1 or more"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_shortcut_block_refuses_too_few_sublayers():
    norms = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
    with pytest.raises(ValueError, match="position pos2 wants 2 sub-layers: 1"):
        ShortcutBlock(tiny_sublayers()[:1], *norms, MLP(DIM, FFN), CG1(DIM), tiny_stream(), Schedule("pos2"))


# What the blocks really do


class LoggingDispatcher(LocalDispatcher):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def dispatch(self, rows_RD, counts_E):
        self.log.append("dispatch")
        return super().dispatch(rows_RD, counts_E)

    def combine(self, rows_RD, receipt):
        self.log.append("combine")
        return super().combine(rows_RD, receipt)


def executed(schedule: Schedule, capacity_factor: float | None, monkeypatch) -> tuple[str, ...]:
    """Operators in the order in which a block starts them, from the tap on."""
    log: list[str] = []

    def logged(f, name: str):
        return lambda *args: (log.append(name), f(*args))[1]

    for name in ("encode", "decode"):
        monkeypatch.setattr(scmoe.moe.stream, name, logged(getattr(scmoe.moe.stream, name), name))
    stream = tiny_stream(2, capacity_factor, schedule.chunks, LoggingDispatcher(log))
    sublayers, norm, shared_expert = tiny_sublayers(), nn.LayerNorm(DIM), MLP(DIM, FFN)
    named = zip(
        ("route", "experts", "shared_expert", "attention", "mlp", "attention"),
        (stream.router, stream.experts, shared_expert, *sublayers),
        strict=True,
    )
    for name, module in named:
        module.register_forward_pre_hook(lambda *_, name=name: log.append(name))
    if schedule.position == "top_k":
        block = TopKBlock(sublayers, norm, stream)
    elif schedule.position == "shared_expert":
        block = SharedExpertBlock(sublayers, norm, shared_expert, CG1(DIM), stream, schedule)
    else:
        block = ShortcutBlock(sublayers, nn.LayerNorm(DIM), norm, shared_expert, CG1(DIM), stream, schedule)
    block.double()(torch.randn(2, 5, DIM, dtype=torch.float64))
    before_tap = len(log) - len(schedule.operators())
    assert log[:before_tap] == ["attention", "mlp", "attention"][:before_tap]
    return tuple(log[before_tap:])


@pytest.mark.parametrize("capacity_factor", (None, 2.0), ids=("dropless", "capacity"))
@pytest.mark.parametrize("chunks", (1, 2, 3))
@pytest.mark.parametrize(("position", "slot"), WITHOUT_DGMOE)
def test_blocks_execute_the_operators_of_their_schedule(position, slot, chunks, capacity_factor, monkeypatch):
    schedule = Schedule(position, slot, chunks)
    assert executed(schedule, capacity_factor, monkeypatch) == schedule.operators()
