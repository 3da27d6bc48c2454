"""Blocks that share weights are not split."""

from __future__ import annotations

import pytest

from scmoe.parallel.dense.fsdp_units import units
from scmoe.training.assembly.model import build_model_on_meta
from tests.support.trainings import tiny

pytestmark = [pytest.mark.ranks, pytest.mark.faults]


@pytest.mark.representative
def test_blocks_that_share_weights_are_not_split():
    model = build_model_on_meta(tiny("architecture=dgmoe_share model.layers=4"))
    with pytest.raises(ValueError, match="share weights"):
        units(model)
