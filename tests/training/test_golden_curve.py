"""A short training on real text has the losses that are stored in tests/golden/curve.json.

The training is in float64, so that a change of the mathematics, of the data or of the random
numbers is visible and rounding is not. On one machine, one or two threads, and kernels with and
without vector instructions, differed by 2e-15 nats at most (40 steps). TOLERANCE leaves room for
what other processors and versions of torch may round differently: training makes such a difference
larger from step to step, and a token whose expert changes makes it visible at once (in float32 it
reached 0.09). It is far below any real change: in the same 40 steps 1e-3 of the load-balance
coefficient moved a loss by 0.012, and 3e-5 of the learning rate by 0.0018.
"""

import json

import pytest

from tests.golden.curve import METRICS, STORED, train

pytestmark = [pytest.mark.smoke, pytest.mark.ranks]
TOLERANCE = 1e-6  # nats


def furthest(losses: dict[str, list[float]]) -> float:
    """Return the largest distance to a stored loss."""
    stored = json.loads(STORED.read_text())
    assert {name: len(values) for name, values in losses.items()} == {
        "train/loss": 20,
        "val/loss": 2,
    }
    pairs = [pair for name in METRICS for pair in zip(losses[name], stored[name], strict=True)]
    return max(abs(ours - theirs) for ours, theirs in pairs)


def test_losses_on_real_text_are_the_stored_ones(tmp_path):
    losses = train(tmp_path)
    assert furthest(losses) < TOLERANCE
    assert losses["val/loss"][-1] < losses["train/loss"][0] - 1, "it has learned something"


@pytest.mark.faults
def test_a_change_of_a_thousandth_is_visible(tmp_path):
    """The changed coefficient is that of the load-balance loss, which has the least weight of what
    is trained."""
    assert furthest(train(tmp_path, "moe.load_balance_coef=0.01001")) > 100 * TOLERANCE
