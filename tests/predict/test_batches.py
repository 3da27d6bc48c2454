"""Which batches are in flight, and how a row of JSON says it."""

import json

import pytest

from scmoe.predict.batches import InFlight


@pytest.mark.parametrize("batches", InFlight)
def test_a_row_of_json_says_which_batches_are_in_flight(batches):
    assert InFlight.read(json.loads(json.dumps(batches.facts))) is batches
    assert batches.number == batches.pieces * batches.held
