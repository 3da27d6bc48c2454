"""What is tried in a training, and until when."""

import pytest

from scmoe.planning.candidates import CANDIDATES, shortlist, still_fastest
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.schedule import Schedule


def test_what_is_tried_are_the_best_of_each_number_of_chunks_and_those_near_the_lowest():
    def candidate(chunks: int, ms: float) -> ModelChoice:
        times = {chunks: OperatorTimes({"attention": ms})}
        layer = LayerChoice(Schedule("scmoe", "pos1", 0, chunks), times, (1.0, 1.0))
        return ModelChoice((layer,))

    priced = {
        1: [candidate(1, ms) for ms in (10.0, 10.9, 11.2)],
        2: [candidate(2, ms) for ms in (14.0, 14.1)],
    }
    assert [choice.predicted for choice in shortlist(priced)] == [10.0, 14.0, 10.9]
    many = {1: [candidate(1, 10.0 + i / 100) for i in range(2 * CANDIDATES)]}
    assert len(shortlist(many)) == CANDIDATES


@pytest.mark.parametrize(
    ("tried", "left"),
    [
        ({0: [1.0] * 4, 1: [2.0] * 4}, [0, 1]),  # too few rounds
        ({0: [1.0] * 5, 1: [1.1] * 5}, [0]),
        ({0: [1.0] * 5, 1: [1.0] * 5}, [0]),  # there is nothing to gain
        (
            {0: [1.0, 2.0, 1.1, 1.0, 3.0], 1: [0.9, 1.8, 0.99, 0.9, 2.7]},
            [1],
        ),  # what disturbs a round disturbs both
        ({0: [1.0, 1.2, 0.9, 1.1, 1.0], 1: [1.1, 1.0, 1.0, 1.0, 1.2]}, [0, 1]),  # not decided yet
        ({0: [1.0] * 5, 1: [1.2] * 4 + [0.2]}, [0, 1]),  # perhaps one step was short by chance
    ],
)
def test_candidates_are_left_until_they_can_be_told_apart(tried, left):
    assert sorted(still_fastest(tried)) == left


def test_after_few_rounds_none_is_left_out_and_the_fastest_comes_first():
    assert still_fastest({0: [2.0], 1: [1.0], 2: [3.0]}) == [1, 0, 2]
    assert still_fastest({0: [], 1: []}) == [0, 1]
