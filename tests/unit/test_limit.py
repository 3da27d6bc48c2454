"""The least time of an iteration: transfers take turns on one link, and a gradient cannot be sent before it exists."""

import pytest

from scmoe.experiments.bench.overlap_report import in_parallel, least_time


@pytest.mark.parametrize(
    ("transfers", "end"),
    [
        ([], 10.0),
        ([(0.0, 4.0), (3.0, 5.0)], 10.0),  # all of it hides
        ([(0.0, 4.0), (0.0, 9.0)], 13.0),  # the link is busy from the start
        ([(2.0, 9.0), (2.0, 4.0)], 15.0),  # the link is idle until there is something to send
        ([(9.5, 2.0), (0.0, 1.0)], 11.5),  # the last gradient is sent after the computation
        ([(0.0, 8.0), (4.0, 1.0), (6.0, 5.0)], 14.0),  # the backlog at 6 is 3 long
    ],
)
def test_transfers_take_turns_beside_the_computation(transfers, end):
    assert in_parallel(10.0, transfers) == end


def test_an_iteration_has_no_gradients_in_forward_and_updates_after_the_last():
    assert least_time(5.0, 10.0, 1.0, rows=2.0, gradients=[(1.0, 3.0)]) == 16.0
    assert least_time(5.0, 10.0, 1.0, rows=7.0, gradients=[(1.0, 6.0)]) == 7.0 + 13.0 + 1.0
