"""Backward is the mirror (design idea 4): what hides a transfer forward hides its gradient's transfer backward.

A transfer is two autograd nodes. Backward, the node of its wait launches the gradient's transfer, that of its start
awaits it. The identity nodes of `Log` stand where those nodes stand, and before and after each operator of the
backbone, and write down when they run. The order is the engine's own; if it ever changes, these tests say so.
"""

from __future__ import annotations

import pytest
import torch

from scmoe.moe.dispatcher import Blocking
from scmoe.schedule.schedule import POSITIONS, Schedule
from tests.support.models import DIM
from tests.support.recording import Log, between, recorded_shortcut_block

SLOTS = [(p, slot) for p, sublayers in POSITIONS.items() for slot in range(sublayers + 2)]
every_slot = pytest.mark.parametrize(("position", "slot"), SLOTS)
every_capacity = pytest.mark.parametrize("capacity_factor", (None, 2.0), ids=("dropless", "capacity"))
every_chunks = pytest.mark.parametrize("chunks", (1, 2))


def run(schedule: Schedule, capacity_factor: float | None, blocking=None) -> Log:
    log = Log()
    block = recorded_shortcut_block(schedule, capacity_factor, log, blocking)
    x_BSD = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block(x_BSD.requires_grad_()).y_BSD.square().sum().backward()
    return log


@every_slot
@every_chunks
@every_capacity
def test_backward_runs_the_nodes_of_forward_in_reverse(position, slot, chunks, capacity_factor):
    log = run(Schedule("scmoe", position, slot, chunks), capacity_factor)
    assert log.backward == log.forward[::-1]
    assert len(log.forward) == 4 * chunks + 2 * chunks + 2 * 4  # transfers, experts, four operators of the backbone


@every_slot
@every_capacity
def test_what_each_transfer_hides_behind(position, slot, capacity_factor):
    """Backward, the combine's gradient travels beside the window after the slot, the dispatch's beside that before."""
    schedule = Schedule("scmoe", position, slot)
    log, window = run(schedule, capacity_factor), list(schedule.window)
    before, after = window[:slot], window[slot:]
    assert between(log.forward, "dispatch 0 start", "dispatch 0 wait") == before
    assert between(log.forward, "combine 0 start", "combine 0 wait") == after
    assert between(log.backward, "combine 0 wait", "combine 0 start") == after[::-1]
    assert between(log.backward, "dispatch 0 wait", "dispatch 0 start") == before[::-1]


@every_slot
def test_chunks_hide_behind_each_others_experts(position, slot):
    log = run(Schedule("scmoe", position, slot, 2), None)
    assert between(log.forward, "dispatch 1 start", "dispatch 1 wait")[-1] == "experts"  # of chunk 0
    assert between(log.forward, "combine 0 start", "combine 0 wait")[0] == "experts"  # of chunk 1
    assert between(log.backward, "combine 0 wait", "combine 0 start")[-1] == "experts"  # of chunk 1
    assert between(log.backward, "dispatch 1 wait", "dispatch 1 start")[0] == "experts"  # of chunk 0


@every_slot
@every_chunks
def test_blocking_hides_nothing_in_either_direction(position, slot, chunks):
    """Negative control, and the sequential baseline: start and wait are neighbours."""
    log = run(Schedule("scmoe", position, slot, chunks), 2.0, Blocking)
    for chunk in range(chunks):
        for transfer in (f"dispatch {chunk}", f"combine {chunk}"):
            assert log.forward.index(f"{transfer} wait") == log.forward.index(f"{transfer} start") + 1
            assert log.backward.index(f"{transfer} start") == log.backward.index(f"{transfer} wait") + 1
