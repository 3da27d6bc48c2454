"""Backward mirrors forward: the operators that hide a transfer forward hide its gradient's transfer
backward.

A transfer has two autograd nodes. In backward, the node of its wait starts the gradient's transfer,
and the node of its start waits for that transfer. Identity nodes of `Log` are next to those nodes
and before and after each operator of the backbone; they record when they run. The autograd engine
decides the order; these tests fail if it changes.
"""

import pytest
import torch

from scmoe.schedule.cost import slots
from scmoe.schedule.schedule import POSITIONS, Schedule
from tests.support.models import DIM
from tests.support.recording import Log, between, recorded_shortcut_block


def schedules(position: str) -> list[Schedule]:
    return [schedule for n in (1, 2) for schedule in slots(Schedule("scmoe", position, chunks=n))]


def run(schedule: Schedule, capacity_factor: float | None) -> Log:
    log = Log()
    block = recorded_shortcut_block(schedule, capacity_factor, log)
    x_BSD = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block(x_BSD.requires_grad_()).y_BSD.square().sum().backward()
    return log


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("capacity_factor", (None, 2.0), ids=("dropless", "capacity"))
def test_backward_runs_the_nodes_of_forward_in_reverse(position, capacity_factor):
    """In backward, the window after the slot hides combine's gradient; the window before it hides
    dispatch's. Chunks hide behind each other's experts."""
    for schedule in schedules(position):
        log = run(schedule, capacity_factor)
        assert log.backward == log.forward[::-1], schedule
        # marks of transfers, of experts and of four operators of the backbone, five where an
        # attention has two parts
        backbone = 4 + schedule.inside_attention
        assert len(log.forward) == 4 * schedule.chunks + 2 * schedule.chunks + 2 * backbone, (
            schedule
        )
        last = schedule.chunks - 1
        dispatch = between(log.forward, f"dispatch {last} start", f"dispatch {last} wait")
        combine = between(log.forward, "combine 0 start", "combine 0 wait")
        assert (
            between(log.backward, f"dispatch {last} wait", f"dispatch {last} start")
            == dispatch[::-1]
        ), schedule
        assert between(log.backward, "combine 0 wait", "combine 0 start") == combine[::-1], schedule
        if schedule.chunks == 1:
            assert (dispatch, combine) == tuple(map(list, schedule.around_experts)), schedule
        else:
            assert dispatch[-1] == "experts" == combine[0], schedule
