"""The simulated step keeps its laws; a cluster's profile is read or refused in one line; the advice
answers as it must where the answer is known."""

import json
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path

import pytest

from scmoe.clusters.advise import advise
from scmoe.clusters.curves import Curve, draw, point
from scmoe.clusters.plan import Choice, Simulator
from scmoe.clusters.played_load import dominant
from scmoe.clusters.profile import KEYS, Link, names, overridden, parse_profile, read_profile
from scmoe.clusters.rank_shares import rank_shares
from scmoe.clusters.simulated_step import (
    Block,
    Head,
    Pass,
    Setting,
    Sum,
    simulate_forward,
    simulate_step,
    sums_end,
)
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.probes.loads import Sizes as Routed
from scmoe.probes.loads import load_of
from scmoe.schedule.cost import EVEN, TRANSFERS, OperatorTimes, Share, computing_time, elapsed_time
from scmoe.schedule.schedule import Schedule
from scmoe.schedule.stack import BEFORE, half_of, stack_time
from scmoe.training.assembly.advice import job_of
from scmoe.training.assembly.advice_curves import compared
from tests.support.advised import quickstart_on_cards

FORWARD = {
    **{BEFORE: 3.0, "route": 0.1, "encode": 0.2, "dispatch": 2.0, "experts": 3.0},
    **{"combine": 2.0, "decode": 0.2, "attention": 2.0, "mlp": 1.5, "shared_expert": 1.5},
}
BACKWARD = {op: t * (1 if op in TRANSFERS else 2) for op, t in FORWARD.items()}
TIMES = OperatorTimes(FORWARD, BACKWARD)
POSITIONS = [Schedule("scmoe", position) for position in ("pos1", "pos2", "pos3")]
SCHEDULES = [
    *(Schedule("top_k", chunks=chunks) for chunks in (1, 2)),
    Schedule("shared_expert"),
    *POSITIONS,
    Schedule("scmoe", "pos2", 1, 2),
]
BEFORE_S = FORWARD[BEFORE] + BACKWARD[BEFORE]


def scaled(times: OperatorTimes, factor: float, operators=TRANSFERS) -> OperatorTimes:
    return OperatorTimes(
        *(
            {op: t * (factor if op in operators else 1) for op, t in each.items()}
            for each in (times.forward, times.backward)
        )
    )


# ---------------------------------------------------------------------- the step


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_pair_takes_what_the_timeline_says(schedule):
    step = simulate_step([Block(schedule, TIMES)], Setting())
    assert step.total == pytest.approx(elapsed_time(schedule, TIMES) + BEFORE_S)
    assert step.computing == pytest.approx(computing_time(schedule, TIMES) + BEFORE_S)
    three = simulate_step([Block(schedule, TIMES)] * 3, Setting(accumulate=2), Head(1.0, 2.0))
    assert three.total == pytest.approx(2 * (3 * step.total + 3))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_halves_take_what_the_stack_says(schedule):
    step = simulate_step([Block(schedule, TIMES)] * 3, Setting(batches_in_flight=2))
    layers = [(schedule, half_of(TIMES))] * 3
    assert step.total == pytest.approx(stack_time(layers, 2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_with_free_transfers_all_ways_take_as_long(schedule):
    free = Block(schedule, scaled(TIMES, 0.0))
    ways = [Setting(), Setting(sequential=True), Setting(batches_in_flight=2), Setting(tax=0.5)]
    totals = [simulate_step([free] * 3, way).total for way in ways]
    assert totals == pytest.approx([totals[0]] * len(ways))


def test_with_an_infinite_link_all_positions_take_as_long():
    """Their sub-layers before the tap and after it are the same ones."""
    total = []
    for schedule in POSITIONS:
        inside = sum(FORWARD[op] for op in schedule.window)
        before = 2 * FORWARD["attention"] + FORWARD["mlp"] + FORWARD["shared_expert"] - inside
        forward = {**FORWARD, BEFORE: before}
        backward = {**BACKWARD, BEFORE: 2 * before}
        block = Block(schedule, scaled(OperatorTimes(forward, backward), 0.0))
        total.append(simulate_step([block] * 2, Setting()).total)
    assert total == pytest.approx([total[0]] * 3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_faster_link_never_slows(schedule):
    sums = (Sum(1.0, BEFORE, 0.5), Sum(1.0, BEFORE), Sum(2.0, "experts"))
    for way in (Setting(), Setting(sequential=True), Setting(batches_in_flight=2, tax=0.2)):
        totals = [
            simulate_step([Block(schedule, scaled(TIMES, f), sums)] * 3, way).total
            for f in (2.0, 1.0, 0.5, 0.25, 0.0)
        ]
        assert totals == sorted(totals, reverse=True)


def test_gradients_fill_the_gaps_of_the_link_in_the_order_in_which_they_are_ready():
    rows = [(2.0, 4.0), (5.0, 6.0)]
    assert sums_end(Pass(10.0, 10.0, rows, [(0.0, 3.0)])) == 5.0  # 0 to 2, then 4 to 5
    assert sums_end(Pass(10.0, 10.0, rows, [(0.0, 3.5)])) == 6.5
    assert sums_end(Pass(10.0, 10.0, rows, [(9.0, 2.0), (1.0, 2.0)])) == 11.0
    assert sums_end(Pass(10.0, 10.0, rows, [])) == 0.0


def test_gradients_without_bytes_add_nothing_and_those_of_the_first_block_are_exposed():
    block = Block(SCHEDULES[0], TIMES)
    plain = simulate_step([block] * 2, Setting(accumulate=3))
    nothing = replace(block, sums=(Sum(0.0, BEFORE), Sum(0.0, "experts")))
    assert simulate_step([nothing] * 2, Setting(accumulate=3)) == plain
    last = replace(block, sums=(Sum(0.25, BEFORE),))
    # ready at the very end of backward; those of the later block are hidden
    summed = simulate_step([last] * 2, Setting(accumulate=3))
    assert summed.exposed_gradients == pytest.approx(0.25)
    assert summed.total == pytest.approx(plain.total + 0.25)


def test_an_operator_that_the_window_has_twice_has_two_sums():
    block = Block(POSITIONS[2], scaled(TIMES, 0.0), (Sum(100.0, "attention"),))
    twice = simulate_step([block], Setting())
    assert 100 < twice.exposed_gradients < 200


def test_chunks_and_halves_pay_launches_and_weights_again():
    fixed = OperatorTimes({"experts": 0.5, "dispatch": 0.1}, {"experts": 1.0, "dispatch": 0.1})
    least = OperatorTimes({"experts": 2.0}, {"experts": 4.0})
    for schedule, way in ((SCHEDULES[1], Setting()), (SCHEDULES[0], Setting(batches_in_flight=2))):
        plain = simulate_step([Block(schedule, TIMES)], way)
        block = Block(schedule, TIMES, (), fixed, least)
        paid = simulate_step([block], way)
        # forward: two pieces of 2 + 0.5 in place of 3; backward twice that
        assert paid.computing == pytest.approx(plain.computing + 3 * (2 * 2.5 - 3))
    whole = simulate_step([Block(SCHEDULES[0], TIMES, (), fixed, least)], Setting())
    assert whole == simulate_step([Block(SCHEDULES[0], TIMES)], Setting())


def test_the_tax_is_a_share_of_what_is_hidden():
    block = Block(Schedule("scmoe", "pos3", 2), TIMES)  # hides all: 4 of each direction
    taxed = simulate_step([block], Setting(tax=0.1))
    assert taxed.exposed_rows == pytest.approx(0.0)
    assert taxed.slowed == pytest.approx(0.1 * 8)
    assert simulate_step([Block(SCHEDULES[0], TIMES)], Setting(tax=0.1)).slowed == 0.0


@pytest.mark.parametrize(("schedule", "batches"), [*product(SCHEDULES, (1, 2))], ids=str)
def test_even_loads_change_nothing_and_uneven_ones_cost(schedule, batches):
    blocks = [Block(schedule, TIMES)] * 2
    way = Setting(batches_in_flight=batches)
    even = simulate_step(blocks, way)
    loads = [[[EVEN] * 3] * schedule.chunks] * 2
    assert simulate_step(blocks, way, loads=loads).total == pytest.approx(even.total)
    hot = [[[Share(1.0, 1.7, 1.7), Share(1.0, 0.65, 0.65)]] * schedule.chunks] * 2
    assert simulate_step(blocks, way, loads=hot).total > even.total + 2 * 3 * 0.7
    forward = simulate_forward(blocks, way, loads=hot).total
    assert 0 < forward < simulate_step(blocks, way, loads=hot).total


def test_only_ranks_that_may_be_the_slowest_are_played():
    load = [[Share(1, 1, 1), Share(1, 2, 2), Share(2, 1, 1), Share(1, 1, 1)]]
    assert dominant(load) == [[Share(1, 2, 2), Share(2, 1, 1)]]


def test_transfers_that_are_waited_for_at_once_hide_nothing():
    with pytest.raises(ValueError, match="two batches"):
        Setting(batches_in_flight=2, sequential=True)


# ---------------------------------------------------------------------- a cluster


def test_every_profile_is_read_and_drawn_within_its_limits():
    from random import Random

    assert {"8xA30-PCIe", "8xA800-NVLink", "2x8xA800", "8xH100"} <= {*names()}
    assert max(read_profile(name).ranks for name in names()) == 1024
    for name in names():
        profile = read_profile(name)
        assert profile.guesses
        for key, number in profile.draw(Random(1)).items():
            assert KEYS[key].low <= number <= KEYS[key].high
        assert overridden(profile, ["cluster.tax=0.3"]).machine().tax == 0.3


def test_bytes_travel_over_the_tier_that_they_must_cross():
    machine = read_profile("8x8xH100-InfiniBand").machine()
    fast_network = replace(machine, network=Link(1e30, 0.0))
    fast_node = replace(machine, node=Link(1e30, 0.0))
    assert machine.all_to_all(1e8, 8) == fast_network.all_to_all(1e8, 8)
    assert machine.all_to_all(1e8, 64) == fast_node.all_to_all(1e8, 64)
    assert machine.all_to_all(1e8, 1) == machine.all_reduce(1e8, 1) == 0.0
    # ranks that hold the same experts of EP 8 are on eight nodes
    network = machine.outside().rate
    assert machine.all_reduce(1e8, 8, 8) == pytest.approx(2 * 1e8 * 7 / 8 / network)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("tax: {value: 0.1, source: guess}", "tax: {value: 2, source: guess}"), "tax.value"),
        (("tax: {value: 0.1, source: guess}", "tax: {value: 0.1, source: rumour}"), "tax.source"),
        (("tax: {value: 0.1, source: guess}", "tax: 0.1"), "tax"),
        (("tax: ", "taxes: "), "taxes"),
        (("ranks: 8", "ranks: 9"), "ranks"),
        (("ranks: 8", "ranks: eight"), "ranks"),
        (("precision: bf16-mixed", "precision: fp8"), "precision"),
        (("attained: {value: 0.5, source: guess}", ""), "attained"),
        (("ranks_per_node: 8", "ranks_per_node: 4"), "links.network.gb_s"),
    ],
)
def test_a_mistake_in_a_profile_is_named_in_one_line(change, key):
    from scmoe.config.load import SHIPPED

    text = (SHIPPED / "cluster/8xA30-PCIe.yaml").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"mine: (unknown key )?{key} ?") as error:
        parse_profile(text.replace(*change, 1), "mine", "mine")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- advice


@pytest.fixture(scope="module")
def counted():
    return quickstart_on_cards()


def answers(counted, *words, **job):
    profile, config, models = counted
    chosen = overridden(profile, [f"cluster.{word}" for word in words])
    setting = replace(job_of(config), **job)
    return advise(list(models.values()), chosen, setting, "top2")


def test_where_rows_take_no_time_a_shortcut_gains_nothing_over_shared_expert(counted):
    free = ("links.node.gb_s=1e5", "links.node.attained=1", "links.node.latency_us=0")
    rows = answers(counted, *free, "peer_us=0", "launch_us=0").rows
    assert rows["scmoe_pos2"].over_best_shared == pytest.approx(1.0, abs=0.02)
    assert rows["top2"].answer == "baseline"


def test_where_rows_take_nearly_all_time_it_pays(counted):
    sizes = job_of(counted[1]).sizes._replace(rows=64)  # gradients take little of the link
    rows = answers(counted, "links.node.gb_s=0.5", sizes=sizes).rows
    assert rows["scmoe_pos2"].answer == "pays" and rows["scmoe_pos2"].over_standard > 1.3
    low, high = rows["scmoe_pos2"].over_best_interval
    assert low <= rows["scmoe_pos2"].over_best <= high
    assert "Waiting for rows takes" in rows["scmoe_pos2"].why


def test_where_a_rank_has_few_tokens_it_does_not_pay(counted):
    """The shared expert's own gradients and update cost more than is hidden."""
    sizes = job_of(counted[1]).sizes._replace(rows=1 / 64)
    rows = answers(counted, "launch_us=0", "links.node.latency_us=0", "peer_us=0", sizes=sizes).rows
    assert rows["scmoe_pos2"].answer == "does not pay"
    assert "tokens a step" in rows["scmoe_pos2"].why


def test_where_every_value_is_given_the_simulator_s_own_error_is_left(counted):
    words = [f"{key}={value.value}" for key, value in counted[0].values.items()]
    rows = answers(counted, *words).rows.values()
    unsure = [row for row in rows if row.answer == "within the error"]
    assert unsure and all("own error" in row.why for row in unsure)


def test_a_load_is_that_of_its_busiest_rank():
    load = rank_shares(load_of("hot_rank:1.5"), Routed(8, 2, 4))
    (chunks,) = load(2)
    assert len(chunks) == 2
    for chunk in chunks:
        assert [round(share.computed, 2) for share in chunk] == [1.5, 0.83, 0.83, 0.83]
    assert rank_shares(load_of("hot_rank:1.0"), Routed(8, 2, 1)) is None


def test_a_recorded_load_takes_the_mean_of_its_steps(counted):
    """Of one recorded step, both of its layers are a step of the load each."""
    profile, config, models = counted
    file = Path(__file__).parents[2] / "docs/figures/routing-quickstart.safetensors"
    sizes = Routed(config.moe.num_experts, 1, 8)
    simulator = Simulator(profile.machine(), job_of(config))

    def step(load):
        model = replace(models["scmoe_pos2"], loads=rank_shares(load_of(load), sizes))
        return simulator.step(model, Choice(model.schedule, 1, False))

    whole, first, second = (step(f"recorded:{file}:0{layer}") for layer in ("", ":0", ":1"))
    assert first.total != second.total
    assert astuple(whole) == pytest.approx(
        [(a + b) / 2 for a, b in zip(astuple(first), astuple(second), strict=True)]
    )


def test_a_curve_has_its_speed_ups_within_their_bands(counted, tmp_path):
    pytest.importorskip("matplotlib")
    profile, config, models = counted
    three = compared(list(models.values()))
    points = [point(x, three, profile, job_of(config), "scmoe_pos2") for x in (1.0, 2.0)]
    for speed_up, (low, high) in points[0].over.values():
        assert low <= speed_up <= high
    draw(Curve("load", "load", points, (1.0, 1.0)), "words", tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_the_verb_answers_in_one_line_of_json(capfd):
    """What runs on the ranks of the cluster may be refused on those of the config."""
    words = ("advise", "quickstart", "cluster=8xA30-PCIe", "moe.capacity_factor=null")
    words += ("strategy.wire_dtype=bfloat16", "trainer.accumulate=64", "samples=4")
    assert call(*words, "load=hot_rank:1.7", "cluster.other_ms=2", "ranks=4", "ep=4") == 0
    out, err = capfd.readouterr()
    facts = json.loads(out.splitlines()[-1])
    assert {"top2", "top2_two", "shared_expert", "scmoe_pos3", "scmoe_pos3_two"} <= {*facts["rows"]}
    for row in facts["rows"].values():
        assert row["interval"][0] <= row["step_ms"] <= row["interval"][1]
        assert row["answer"] and row["why"] and row["over_top2"] > 0 < row["over_shared"]
    assert "4 ranks, EP 4" in err


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("cluster=9xA30",),
        ("cluster=8xA30-PCIe", "ranks=16"),
        ("cluster=8xA30-PCIe", "cluster.taxes=1"),
        ("cluster=8xA30-PCIe", "trainer.precision=32-true"),
        ("cluster=8xA30-PCIe", "ep=3"),
        ("cluster=8xA30-PCIe", "strategy.dense=sharded"),
        ("cluster=8xA30-PCIe", "load=hot_rank:9", "moe.capacity_factor=null"),
        ("cluster=8xA30-PCIe", "load=hot_rank:1.7"),  # every slot of a capacity travels
        ("cluster=8xA30-PCIe", "strategy.ep_size=8"),  # ep=8 is meant
        ("cluster=8xA30-PCIe", "trainer.accumulate=0"),
        ("cluster=8xA30-PCIe", "moe.architecture=dgmoe"),
        ("cluster=8xA30-PCIe", "moe.architecture=top_k", "moe.top_k=1"),
        ("cluster=8xA30-PCIe", "moe.num_experts=2", "moe.top_k=2"),
        ("cluster=8xA30-PCIe", "optim.name=muon"),
        ("cluster=8xA30-PCIe", "schedule.batches_in_flight=1"),  # one and two are compared
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(words, capfd):
    assert call("advise", "quickstart", *words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
