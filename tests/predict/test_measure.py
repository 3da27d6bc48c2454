"""A measured profile is that of its slowest rank; what cannot be measured is refused in one line.
None of it needs a card."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from scmoe.config.leaves import ConfigError
from scmoe.predict import measure
from scmoe.predict.advise import advise
from scmoe.predict.asked_config import read_asked
from scmoe.predict.cluster import KEYS, NETWORK, names, read_profile
from scmoe.predict.cluster_rates import Groups
from scmoe.predict.judged_job import Request
from scmoe.predict.measure import (
    COPIED,
    HOST_SIZES,
    LARGE_BYTES,
    SMALL_BYTES,
    RankTimes,
    profile_of,
)
from tests.support.advised import counted_on
from tests.support.ended import end_at_once

# a card without links
CARD = RankTimes(product=1e-3, copy=4e-4, launches=4e-4)
RATE, LATENCY = 10e9, 50e-6  # of the links below


def exchanged(seconds: RankTimes, ranks: int) -> RankTimes:
    travels = (ranks - 1) / ranks
    small, large = (LATENCY + nbytes * travels / RATE for nbytes in (SMALL_BYTES, LARGE_BYTES))
    return seconds._replace(small=small, large=large, lost=0.02, hidden=0.1)


def test_the_numbers_are_those_of_the_slowest_rank():
    fast = exchanged(RankTimes(product=0.05, copy=0.02, launches=1e-4), 2)
    slow = exchanged(RankTimes(product=0.1, copy=0.01, launches=2e-4), 2)._replace(lost=0.03)
    profile = profile_of([fast, slow], on_cards=False, card=None)
    machine = profile.machine()
    rows, width, columns = HOST_SIZES
    assert machine.flops == pytest.approx(2 * rows * width * columns / 0.1)
    assert machine.memory == pytest.approx(2 * COPIED / 0.02)
    assert machine.launch == pytest.approx(2e-6) and machine.tax == pytest.approx(0.3)
    assert machine.all_to_all(1e8, Groups(2, 2)) == pytest.approx(LATENCY + 0.5e8 / RATE)
    # what is 1 by definition has no band
    assert profile.values["attained"].source == profile.values["links.node.attained"].source
    assert profile.values["attained"] == (1.0, "given")
    assert profile.ranks == profile.ranks_per_node == 2 and profile.precision == "32-true"


def test_the_peak_of_a_known_card_is_its_datasheet_s():
    measured = [exchanged(CARD, 2)] * 2
    known = profile_of(measured, True, "NVIDIA H100 80GB HBM3")
    unknown = profile_of(measured, True, "another card")
    assert known.values["peak_tflops"] == (989.4, "datasheet")
    assert known.values["attained"].source == unknown.values["peak_tflops"].source == "measured"
    assert known.machine().flops == pytest.approx(unknown.machine().flops)


def test_a_single_card_has_no_links_and_can_be_advised():
    profile = profile_of([CARD], True, "NVIDIA H100 80GB HBM3")
    assert "links.node.gb_s" not in profile.guesses
    job, models = counted_on(
        profile,
        Request(read_asked("quickstart", ["model.layers=2"])),
        "top2",
        "shared_expert",
        "scmoe_pos2",
    )
    advice = advise([models["top2"], models["shared_expert"], models["scmoe_pos2"]], profile, job)
    assert job.ep_sizes == (1,)
    for row in advice.rows.values():
        assert row.step.exposed_rows == pytest.approx(0.0, abs=1e-12)  # sums of times


def test_memory_is_that_of_the_smallest_card_or_a_rank_s_share_of_this_machine(monkeypatch):
    class Properties(NamedTuple):
        total_memory: float

    sizes = {torch.device("cuda", 0): Properties(80e9), torch.device("cuda", 1): Properties(40e9)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    assert measure.memory_here(True, 2) == 40e9
    all_of_it = measure.memory_here(False, 1)
    assert 0 < measure.memory_here(False, 2) == all_of_it / 2


@pytest.mark.parametrize(
    ("disturbed", "words"),
    [
        ({"small": 2.0}, "links have no rate"),
        ({"small": 1e-9, "large": 2e-9}, "links.node.gb_s"),
        ({"launches": 100.0}, "launch_us"),
    ],
)
def test_a_measurement_that_other_work_has_disturbed_is_refused(disturbed, words):
    seconds = exchanged(CARD, 2)._replace(**disturbed)
    with pytest.raises(ConfigError, match=words) as error:
        profile_of([seconds, seconds], True, None)
    assert "\n" not in str(error.value)


def test_cards_that_cannot_exchange_are_refused_before_a_process_starts(monkeypatch):
    """One card alone needs no NCCL."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(measure, "measured_by", lambda ranks: pytest.fail("processes"))
    with pytest.raises(ConfigError, match="NCCL"):
        measure.measure()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert measure.ranks_here() == (True, 1)


def test_a_rank_that_ends_without_a_result_ends_the_measurement_in_one_line(monkeypatch):
    monkeypatch.setattr(measure, "_rank", end_at_once)
    with pytest.raises(ConfigError, match="exit code 3") as error:
        measure.measured_by(1)
    assert "\n" not in str(error.value)


@pytest.mark.ranks
@pytest.mark.faults  # it takes long, and a busy machine may be off the bounds
def test_this_machine_is_measured():
    profile = measure.measure()
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


def test_what_is_not_measured_is_guessed_as_in_the_profiles():
    for name in names():
        values = read_profile(name).values
        assert {key: values[key].value for key in measure.GUESSED} == measure.GUESSED
