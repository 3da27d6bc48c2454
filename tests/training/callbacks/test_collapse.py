"""A layer that collapses is named once."""

import pytest
import torch

from scmoe.training.callbacks.collapse import PATIENCE, CollapseAlarm

TOKENS = 100


def window_of(*layers: list[int]) -> torch.Tensor:
    """Return the load sums of layers with these copies per expert."""
    return torch.tensor([[*counts, TOKENS, 0] for counts in layers])


def alarms(alarm: CollapseAlarm, sums: torch.Tensor, times: int) -> list[str]:
    return [line for _ in range(times) for line in alarm(sums)]


def test_a_collapsed_layer_is_named_once_with_its_expert_and_share():
    alarm, sums = CollapseAlarm(), window_of([25, 25, 25, 25], [5, 5, 80, 10])
    assert alarms(alarm, sums, PATIENCE - 1) == []
    (line,) = alarms(alarm, sums, 1)
    assert line.startswith(
        "MoE layer 1: the router has collapsed, expert 2 gets 80% of the tokens (fair: 25%)"
    )
    assert (
        alarms(alarm, window_of([25, 25, 25, 25], [25, 25, 25, 25]), 1)
        == alarms(alarm, sums, 3 * PATIENCE)
        == []
    )


@pytest.mark.parametrize(
    "counts, collapsed",
    [
        ([62, 13, 13, 12], False),  # K = 1 of 4: even is 25 of 100 tokens, halfway to all is 62.5
        ([63, 13, 12, 12], True),
        ([75, 65, 30, 30], False),  # K = 2 of 4: even is 50, halfway is 75
        ([76, 64, 30, 30], True),
        ([100, 100, 0, 0], True),
        ([100, 100, 100, 100], False),  # every expert has every token: there is no choice
        ([0, 0, 0, 0], False),
    ],
)
def test_collapsed_is_more_than_halfway_from_even_to_all_tokens(counts, collapsed):
    assert bool(alarms(CollapseAlarm(), window_of(counts), PATIENCE)) == collapsed


def test_a_collapsed_double_gate_is_noticed():
    """Its sums count each of 50 tokens twice, and a token's two experts differ: all tokens are half
    of the count."""
    assert alarms(CollapseAlarm(doubled={0}), window_of([50, 50, 0, 0]), PATIENCE)
    assert not alarms(CollapseAlarm(doubled={0}), window_of([35, 35, 15, 15]), PATIENCE)
    assert not alarms(CollapseAlarm(), window_of([50, 50, 0, 0]), PATIENCE)
    assert not alarms(CollapseAlarm(doubled={1}), window_of([50, 50, 0, 0]), PATIENCE), (
        "Swin's other stage has one gate"
    )


def test_a_break_resets_the_count():
    alarm = CollapseAlarm()
    for sums in [window_of([97, 1, 1, 1])] * (PATIENCE - 1) + [window_of([25, 25, 25, 25])]:
        assert alarm(sums) == []
    assert alarms(alarm, window_of([97, 1, 1, 1]), PATIENCE - 1) == []
    assert len(alarms(alarm, window_of([97, 1, 1, 1]), 1)) == 1
