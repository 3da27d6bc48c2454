"""This machine is measured by two processes, and the profile can be used as any other."""

import pytest

from scmoe.predict.cluster import KEYS, NETWORK
from scmoe.predict.cluster_rates import Groups
from scmoe.predict.measure import measure

pytestmark = pytest.mark.ranks


@pytest.mark.faults  # it takes long, and a busy machine may be off the bounds
def test_this_machine_is_measured():
    profile = measure()
    assert profile.ranks == profile.ranks_per_node >= 1
    assert {*profile.values} == {key for key in KEYS if not key.startswith(NETWORK)}
    for key, value in profile.values.items():
        assert KEYS[key].low <= value.value <= KEYS[key].high, key
    measured = {key for key, value in profile.values.items() if value.source == "measured"}
    assert {"peak_tflops", "memory_gb_s", "links.node.gb_s", "tax"} <= measured
    assert profile.memory is not None and profile.memory > 1e8
    machine = profile.machine()
    small, large = (machine.all_to_all(nbytes, Groups(2, 2)) for nbytes in (2**16, 2**24))
    assert 0 < small < large
