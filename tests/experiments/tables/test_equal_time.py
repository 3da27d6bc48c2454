"""Curves are read at an equal time."""

from experiments.tables.equal_time import best_speed, loss_at, step_reached


def test_a_curve_is_read_between_its_points_and_not_outside():
    curve = [[2, 5.0], [4, 4.0]]
    assert [loss_at(curve, step) for step in (2, 3, 4, 1, 5)] == [5.0, 4.5, 4.0, None, None]
    assert loss_at([[4, 4.0]], 4) == 4.0
    speeds = [1 + i / 10_000 for i in range(15_000)]
    assert all(step_reached(600, x, x) == 600 for x in speeds), (
        "the fastest row is at its last step"
    )


def test_a_pipelined_row_is_compared_with_its_two_batches_in_flight():
    speeds = {"scmoe_pos2_pipelined": 1.2, "scmoe_pos2_two": 1.5}
    rows = {
        name: {"train_speedup": speed, "train_quartiles": [speed, speed]}
        for name, speed in speeds.items()
    }
    assert best_speed({"rows": rows}, "scmoe_pos2_pipelined").median == 1.5
