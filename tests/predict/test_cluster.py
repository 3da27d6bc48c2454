"""A cluster's profile is read or refused in one line, and its links carry what they must."""

from dataclasses import replace

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.config.load import SHIPPED
from scmoe.predict.cluster import names, overridden, parse_profile, read_profile
from scmoe.predict.cluster_rates import Groups, Link, Machine, rows_for_each_node

TIERED = Machine(1.0, 1.0, Link(1.0, 0.0), Link(1.0, 0.0), ranks_per_node=8)


def test_every_profile_is_read():
    assert {"8xA30-PCIe", "8xA800-NVLink", "2x8xA800", "8xH100"} <= {*names()}
    slower, faster = (f"128x8xH100-{fabric}" for fabric in ("Ethernet", "InfiniBand"))
    assert read_profile(slower).ranks == read_profile(faster).ranks == 1024
    rates = [read_profile(name).machine().outside().rate for name in (slower, faster)]
    assert rates[0] < rates[1] / 4
    for name in names():
        profile = read_profile(name)
        assert profile.guesses
        assert overridden(profile, ["cluster.tax=0.3"]).machine().tax == 0.3
        assert profile.memory in (24e9, 80e9, 141e9, 180e9)
        assert overridden(profile, ["cluster.memory_gb=40"]).memory == 40e9


def test_bytes_travel_over_the_tier_that_they_must_cross():
    machine = read_profile("8x8xH100-InfiniBand").machine()
    fast_network = replace(machine, network=Link(1e30, 0.0))
    fast_node = replace(machine, node=Link(1e30, 0.0))
    eight, all_ranks = Groups(8, 64), Groups(64, 64)
    assert machine.all_to_all(1e8, eight) == fast_network.all_to_all(1e8, eight)
    assert machine.all_to_all(1e8, all_ranks) == fast_node.all_to_all(1e8, all_ranks)
    alone = Groups(1, 64)
    assert machine.all_to_all(1e8, alone) == machine.all_reduce(1e8, alone) == 0.0
    # ranks that hold the same experts of EP 8 are on eight nodes
    network = machine.outside().rate
    same_experts = Groups(8, 64, distance=8)
    assert machine.all_reduce(1e8, same_experts) == pytest.approx(2 * 1e8 * 7 / 8 / network)


@pytest.mark.parametrize(
    ("groups", "in_node", "between_nodes"),
    [
        (Groups(4, 8), 3 / 4, None),
        (Groups(6, 6), 5 / 6, None),  # one group, on a part of a node
        (Groups(16, 64), 7 / 16, 8 / 16),
        (Groups(64, 64), 7 / 64, 56 / 64),
        (Groups(6, 24), 5 / 6, 4 / 6),  # ranks 6 and 7 are on another node than 8 to 11
        (Groups(12, 24), 7 / 12, 8 / 12),  # ranks 8 to 11 are alone on their node
    ],
    ids=str,
)
def test_the_rank_with_the_most_distant_rows_decides(groups, in_node, between_nodes):
    """Nodes of eight; the shares of a rank's bytes that cross a tier."""
    machine = replace(TIERED, node=Link(400.0, 0.0), network=Link(40.0, 0.0))
    seconds = machine.all_to_all_bytes(4000.0, groups)
    assert seconds["node"] == pytest.approx(10 * in_node)
    assert seconds.get("network") == pytest.approx(between_nodes and 100 * between_nodes)
    longest = max(10 * in_node, 100 * (between_nodes or 0))
    assert machine.all_to_all(4000.0, groups) == pytest.approx(longest)


def test_the_latency_of_an_exchange_is_that_of_the_farthest_ranks():
    machine = replace(TIERED, node=Link(1.0, 2.0), network=Link(1.0, 30.0), peer=0.5)
    assert machine.all_to_all(0.0, Groups(4, 24)) == 2.0 + 3 * 0.5
    assert machine.all_to_all(0.0, Groups(6, 24)) == 30.0 + 5 * 0.5


@pytest.mark.parametrize(
    ("groups", "seconds"),
    [
        (Groups(8, 8), 2 * 10 * 7 / 8),
        # a ring in each node, and between two nodes for an eighth of the bytes
        (Groups(16, 16), 2 * 10 * 7 / 8 + 2 * 100 / 8 * 1 / 2),
        (Groups(4, 16, distance=4), 2 * 10 * 1 / 2 + 2 * 100 / 2 * 1 / 2),
        (Groups(2, 16, distance=8), 2 * 100 * 1 / 2),
        (Groups(2, 24, distance=12), 2 * 100 * 1 / 2),
    ],
    ids=str,
)
def test_a_sum_is_a_ring_in_each_node_and_one_between_nodes(groups, seconds):
    machine = replace(TIERED, node=Link(400.0, 0.0), network=Link(40.0, 0.0))
    assert machine.all_reduce(4000.0, groups) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("tax: {value: 0.1, source: guess}", "tax: {value: 2, source: guess}"), "tax.value"),
        (("tax: {value: 0.1, source: guess}", "tax: {value: 0.1, source: rumour}"), "tax.source"),
        (("tax: {value: 0.1, source: guess}", "tax: 0.1"), "tax"),
        (("tax: ", "taxes: "), "taxes"),
        (("memory_gb: {value: 24,", "memory_gb: {value: 0,"), "memory_gb.value"),
        (("memory_gb: {value: 24, source: datasheet}", "memory_gb: 24"), "memory_gb"),
        (("ranks: 8", "ranks: 9"), "ranks"),
        (("ranks: 8", "ranks: eight"), "ranks"),
        (("precision: bf16-mixed", "precision: fp8"), "precision"),
        (("attained: {value: 0.5, source: guess}", ""), "attained"),
        (("ranks_per_node: 8", "ranks_per_node: 4"), "links.network.gb_s"),
    ],
)
def test_a_mistake_in_a_profile_is_named_in_one_line(change, key):
    text = (SHIPPED / "cluster/8xA30-PCIe.yaml").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"mine: (unknown key )?{key} ?") as error:
        parse_profile(text.replace(*change, 1), "mine", "mine")
    assert "\n" not in str(error.value)


def test_a_network_of_one_node_is_stated_as_a_whole_or_not_at_all():
    text = (SHIPPED / "cluster/8xA30-PCIe.yaml").read_text(encoding="utf-8")
    rate = "  network: {gb_s: {value: 25, source: datasheet}}\n"
    with pytest.raises(ConfigError, match=r"links\.network\.attained is missing"):
        parse_profile(text.replace("links:\n", f"links:\n{rate}"), "mine", "mine")


def test_a_profile_need_not_state_the_device_s_memory():
    text = (SHIPPED / "cluster/8xA30-PCIe.yaml").read_text(encoding="utf-8")
    without = text.replace("memory_gb: {value: 24, source: datasheet}\n", "")
    assert without != text and parse_profile(without, "mine", "mine").memory is None


def test_one_row_of_a_token_for_each_node_is_as_many_as_its_experts_are_on():
    """Of 2 copies over 2 nodes, both are on one node in half of the cases; one copy is one row."""
    assert rows_for_each_node(2, 2) == pytest.approx(1.5 / 2)
    assert rows_for_each_node(1, 4) == pytest.approx(1.0)
    assert rows_for_each_node(8, 2) == pytest.approx(2 * (1 - 2**-8) / 8)
    machine = replace(TIERED, node=Link(400.0, 0.0), network=Link(40.0, 0.0))
    groups = Groups(16, 16)
    each_copy = machine.all_to_all_bytes(4000.0, groups)
    for_nodes = machine.all_to_all_bytes(4000.0, groups, copies=8)
    assert for_nodes["node"] == each_copy["node"]
    assert for_nodes["network"] == pytest.approx(rows_for_each_node(8, 2) * each_copy["network"])


def test_a_rate_in_gigabits_is_refused():
    with pytest.raises(ConfigError, match="gb_s is '400'"):
        read_profile("2x8xA800", ["cluster.links.network.gb_s=400"])


@pytest.mark.parametrize("groups", [Groups(8, 8), Groups(16, 16), Groups(2, 16, distance=8)])
def test_a_gather_is_half_of_a_sum_on_any_nodes(groups):
    machine = replace(TIERED, node=Link(400.0, 0.0), network=Link(40.0, 0.0))
    whole = machine.all_reduce(4000.0, groups)
    assert machine.gather(4000.0, groups) == pytest.approx(whole / 2)
