"""Two batches in flight, played: the order is that of a run, the times keep their limits, and the
planner finds the fastest way."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from experiments.bench.overlap import timeline
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.halved_batches import may_run_two_batches
from scmoe.config.load import load_config
from scmoe.files import read_json
from scmoe.models.run_as import run_as, schedule_of
from scmoe.moe.recorder import Recorder
from scmoe.planning import planner as planner_module
from scmoe.planning.candidates import CANDIDATES_IN_HALVES, shortlist, shortlist_in_flight
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.planning.plan_file import in_flight_from, plan_from_json, plan_to_json
from scmoe.planning.planner import Planner
from scmoe.planning.pricing import OPERATORS as MEASURED
from scmoe.planning.pricing import Sample
from scmoe.runs.evaluate.evaluation import ran_two_batches, with_batch_of_a_rank
from scmoe.schedule.cost import OperatorTimes, computing_time, elapsed_time, slots
from scmoe.schedule.play import BEFORE, TRANSFERS, order_of
from scmoe.schedule.schedule import Schedule
from scmoe.schedule.stack import half_of, play_stack, stack_time, waiting_time, windows_time
from scmoe.training.assembly.trainer import build_callbacks
from scmoe.training.callbacks.adaptive_schedule import AdaptiveSchedule, plan_lines
from tests.support.models import tiny, tiny_batch, tiny_model
from tests.support.played import EVERY_OPERATOR, EVERY_WIRING, played_model

TIMES = st.fixed_dictionaries({op: st.floats(0.1, 10.0) for op in EVERY_OPERATOR})
SCHEDULES = st.sampled_from(
    [choice for name in EVERY_WIRING for n in (1, 3) for choice in slots(Schedule(*name, chunks=n))]
)
LAYERS = st.lists(
    st.tuples(SCHEDULES, st.builds(OperatorTimes, TIMES, TIMES)), min_size=1, max_size=3
)


def sums(layers):
    """Return the time of all computation and of all transfers of one batch, by direction."""
    for name in ("forward", "backward"):
        computed, sent = 0.0, 0.0
        for schedule, times in layers:
            own = getattr(times, name)
            one_way = OperatorTimes(
                own if name == "forward" else {}, {} if name == "forward" else own
            )
            computed += own[BEFORE] + computing_time(schedule, one_way)
            sent += sum(own[op] for op in TRANSFERS)
        yield computed, sent


@given(LAYERS)
def test_one_batch_takes_the_time_of_its_windows_and_of_what_is_before_the_taps(layers):
    each = [
        of.forward[BEFORE] + of.backward[BEFORE] + elapsed_time(schedule, of)
        for schedule, of in layers
    ]
    assert stack_time(layers, 1) == pytest.approx(sum(each))


@given(LAYERS)
def test_halves_take_at_least_all_computation_or_all_transfers_and_at_most_both(layers):
    halves = [(schedule, half_of(of)) for schedule, of in layers]
    least = sum(max(computed, sent) for computed, sent in sums(layers))
    most = sum(computed + sent for computed, sent in sums(layers))
    assert least <= stack_time(halves, 2) * (1 + 1e-9) <= most * (1 + 1e-6)
    computed = sum(computed for computed, _ in sums(layers))
    assert waiting_time(halves) == pytest.approx(stack_time(halves, 2) - computed, abs=1e-6)
    assert waiting_time(halves) > -1e-6


@given(LAYERS)
def test_halves_take_as_long_as_one_batch_where_transfers_are_free(layers):
    def free(times):
        return times | dict.fromkeys(TRANSFERS, 0.0)

    layers = [
        (schedule, OperatorTimes(free(of.forward), free(of.backward))) for schedule, of in layers
    ]
    halves = [(schedule, half_of(of)) for schedule, of in layers]
    assert stack_time(halves, 2) == pytest.approx(stack_time(layers, 1))
    assert windows_time(halves) == pytest.approx(sum(elapsed_time(*each) for each in layers))


@given(LAYERS, st.sampled_from(["forward", "backward"]))
def test_operators_of_both_halves_take_turns_on_the_processor_and_on_the_link(layers, direction):
    spans = play_stack([(schedule, half_of(of)) for schedule, of in layers], direction)
    for transfers in (True, False):
        row = sorted((s.start, s.end) for s in spans if s.is_transfer is transfers)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(row))


def test_a_half_computes_while_the_other_one_s_rows_travel():
    """Two blocks of top-2 whose transfers take as long as a half computes: the first and the last
    transfer of a direction are hidden by nothing but experts.

    computation    A 1  A 2  E 1 E 2  A 1  A 2  E 1 E 2
    transfers           D 1  D 2      ...
    """
    times = {BEFORE: 10.0, "experts": 2.0, "dispatch": 10.0, "combine": 10.0}
    layers = [(Schedule("top_k"), half_of(OperatorTimes(times)))] * 2
    played = [span for span in play_stack(layers) if span.end > span.start]
    spans = [[(s.operator, s.start) for s in played if s.half == half] for half in (0, 1)]
    assert spans[0][:4] == [(BEFORE, 0.0), ("dispatch", 5.0), ("experts", 10.0), ("combine", 15.0)]
    assert spans[1][:4] == [(BEFORE, 5.0), ("dispatch", 10.0), ("experts", 15.0), ("combine", 20.0)]
    assert stack_time(layers, 2) < stack_time([(Schedule("top_k"), OperatorTimes(times))] * 2, 1)


@pytest.mark.parametrize("words", ["architecture=top_k", "position=pos2", "position=pos3"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("rows", ["moe.rows=slots", "moe.capacity_factor=null"])
def test_the_order_is_that_of_a_run(words, chunks, rows):
    """Of the operators of the MoE stream, forward and backward; with numbers of rows that are
    announced, too."""
    config = tiny(f"moe.{words}", "model.layers=4", rows, f"schedule.chunks={chunks}")
    model = tiny_model(config)
    blocks, recorder = moe_blocks_of(model), Recorder(torch.device("cpu"))
    two = replace(schedule_of(model), batches_in_flight=2)
    run_as(model, two, recorders=[recorder] * len(blocks))
    ids_BS, _ = tiny_batch(config, 2)
    model(ids_BS).logits_BSV.sum().backward()
    order = order_of([block.schedule for block in blocks], batches=2)
    planned = {"forward": order, "backward": order[::-1]}
    computed = ("route", "encode", "experts", "decode")
    for direction, steps in planned.items():
        ran = [m.operator for m in recorder.marks if m.begins and m.direction == direction]
        assert [op for op in ran if op in computed] == [
            step.operator for step in steps if step.kind == "compute" and step.operator in computed
        ]
    launched = [m.operator for m in recorder.marks if m.begins and m.direction == "forward"]
    assert [op for op in launched if op in (*TRANSFERS, *computed)] == [
        step.operator
        for step in order
        if step.kind == "launch" or (step.kind == "compute" and step.operator in computed)
    ]


# ---------------------------------------------------------------------- the planner's candidates


def priced(transfer_ms, chunks=(1, 2, 4)):
    """Return the candidates of two blocks of top-2, of which one batch can hide nothing but by
    chunks."""
    times = {BEFORE: 20.0, "experts": 4.0, "dispatch": transfer_ms, "combine": transfer_ms}
    of_chunks = {n: OperatorTimes(times, times) for n in chunks}
    return {
        n: [ModelChoice((LayerChoice(Schedule("top_k", chunks=n), of_chunks, (0.0, 0.0)),) * 2)]
        for n in chunks
    }


def test_one_batch_and_two_are_tried_and_chunks_with_two_where_their_price_is_lower():
    candidates = shortlist_in_flight(priced(10.0), (1, 2))
    one = [choice for choice in candidates if choice.batches == 1]
    two = [choice for choice in candidates if choice.batches == 2]
    assert one == shortlist(priced(10.0)) == shortlist_in_flight(priced(10.0), (1,))
    assert 1 <= len(two) <= CANDIDATES_IN_HALVES and two[0].layers[0].schedule.chunks == 1
    assert two[0].predicted < min(choice.predicted for choice in one)
    assert all(more.predicted < two[0].predicted for more in two[1:])
    assert len(shortlist_in_flight(priced(0.1), (2,))) == 1, "chunks gain nothing there"


class Machine:
    """Two equal blocks whose steps take as long as `schedule/` says, in ms.

    transfer_ms: of all rows. latency_ms: of each message. longer: what halving products costs."""

    def __init__(self, transfer_ms, latency_ms, longer):
        self.transfer_ms, self.latency_ms, self.longer = transfer_ms, latency_ms, longer

    def times(self, chunks, batches=1):
        computed = {
            BEFORE: 150.0,
            "attention": 90.0,
            "attention_core": 72.0,
            "attention_out": 18.0,
            "mlp": 30.0,
            "shared_expert": 30.0,
            "experts": 30.0,
        }
        forward = {op: ms * (self.longer if batches == 2 else 1) for op, ms in computed.items()}
        sent = dict.fromkeys(TRANSFERS, self.transfer_ms + batches * chunks * self.latency_ms)
        backward = {op: 2 * ms for op, ms in forward.items()}
        whole = OperatorTimes(forward | sent, backward | sent)
        return whole if batches == 1 else half_of(whole)

    def step_ms(self, schedule, batches):
        return stack_time([(schedule, self.times(schedule.chunks, batches))] * 2, batches)

    def sample(self, chunks):
        """Return what `pricing.measured` returns after a step in so many chunks."""
        of = self.times(chunks)
        layers = []
        for own in (of.forward, of.backward):
            operators = torch.tensor([own.get(op, 0.0) for op in MEASURED], dtype=torch.float64)
            before = torch.tensor(own.get(BEFORE, 0.0), dtype=torch.float64)
            whole = operators.sum() + before
            layers.append(Sample(operators, before, whole, whole))
        return Sample.stacked([Sample.stacked(layers)] * 2)

    def chosen(self, own, numbers):
        """Return the planner's choice, and the number of batches that its model then has."""
        model = played_model(own, own)

        def slowest(*_):
            schedule = schedule_of(model)
            return self.step_ms(schedule.blocks[0], schedule.batches_in_flight)

        def measured(recorders, schedules, *_):
            assert schedule_of(model).batches_in_flight == 1
            return self.sample(schedules[0].chunks)

        replaced = {
            "start_clocks": lambda *_: None,
            "measured": measured,
            "seconds_of_slowest_rank": slowest,
        }
        broadcast = patch.object(planner_module.dist, "broadcast", lambda *_, **__: None)
        with patch.multiple(planner_module, **replaced), broadcast:
            planner = Planner(
                model, None, torch.device("cpu"), (1, 2, 4), numbers_in_flight=numbers
            )
            while planner.agenda:
                planner.begin_step()
                planner.end_step()
            planner.begin_step(timed=True)
            planner.end_step()
        (layer, other) = planner.choice.layers
        assert layer == other
        return planner.choice, schedule_of(model).batches_in_flight


@pytest.mark.parametrize("longer", [1.0, 1.12])
@pytest.mark.parametrize("transfer_ms", [5.0, 40.0, 120.0, 300.0])
def test_the_choice_is_within_3_percent_of_the_best_of_one_and_two_batches(transfer_ms, longer):
    machine = Machine(transfer_ms, 1.0, longer)
    for name in (("top_k", None), ("shared_expert", None), ("scmoe", "pos2"), ("scmoe", "pos3")):
        choice, in_flight = machine.chosen(Schedule(*name), (1, 2))
        assert choice.batches == in_flight
        chosen = choice.layers[0].schedule
        every = {
            (schedule, batches): machine.step_ms(schedule, batches)
            for chunks in (1, 2, 4)
            for schedule in slots(Schedule(*name, chunks=chunks))
            for batches in (1, 2)
        }
        best = min(every, key=every.get)
        assert every[chosen, in_flight] <= 1.03 * every[best], (name, best, chosen)


def test_two_batches_are_chosen_for_long_transfers_and_one_where_halving_costs_more():
    long, short = Machine(120.0, 1.0, 1.05), Machine(5.0, 1.0, 1.12)
    assert long.chosen(Schedule("top_k"), (1, 2))[1] == 2
    assert long.chosen(Schedule("top_k"), (1,))[1] == 1
    assert short.chosen(Schedule("top_k"), (1, 2))[1] == 1
    assert short.chosen(Schedule("top_k"), (2,))[1] == 2


@pytest.mark.parametrize(
    ("words", "may"),
    [
        ("", True),
        ("schedule.batches_in_flight=1", False),
        ("strategy.ep_size=1", False),
        ("data.global_batch_size=2", False),
        ("trainer.accumulate=2 data.global_batch_size=4", False),
        ("analysis.similarity_every=5", False),
        ("moe.capacity_factor=null moe.dropless_ceiling=1.2", False),
        ("moe.architecture=shared_expert moe.capacity_factor=null", True),
    ],
)
def test_auto_tries_two_batches_where_they_would_be_accepted(words, may):
    config = load_config(None, ["trainer.devices=2", "schedule.auto=true", *words.split()])
    assert may_run_two_batches(config) is may
    (callback,) = [c for c in build_callbacks(config, None) if isinstance(c, AdaptiveSchedule)]
    assert callback.in_flight == ((1, 2) if may else (1,))


def test_a_plan_with_two_batches_survives_its_file_and_is_drawn_in_halves(tmp_path):
    choice, _ = Machine(120.0, 1.0, 1.05).chosen(Schedule("top_k"), (2,))
    plan = plan_to_json(choice, {}, 9)
    assert plan_from_json(plan) == choice
    assert sum(layer["predicted_s"] for layer in plan["layers"]) == choice.predicted
    assert "two batches in flight" in plan_lines(choice)[0]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    drawn = []
    with patch.object(timeline, "draw", lambda rows, *_: drawn.append(rows)):
        timeline.draw_plan(tmp_path)
    assert [sum("half" in name for name in rows) for rows in drawn] == [2, 2]


def test_an_evaluation_knows_the_number_of_batches_that_auto_has_chosen(tmp_path):
    """A capacity counts the tokens of a half then."""
    config = load_config(None, ["trainer.devices=2", "schedule.auto=true"])
    assert not ran_two_batches(tmp_path, config, 20), "nothing is chosen yet"
    choice, _ = Machine(120.0, 1.0, 1.05).chosen(Schedule("top_k"), (2,))
    (tmp_path / "plan.json").write_text(json.dumps(plan_to_json(choice, {}, 9)))
    assert ran_two_batches(tmp_path, config, 10) and not ran_two_batches(tmp_path, config, 9)
    one = plan_to_json(replace(choice, batches=1), {}, 30, read_json(tmp_path / "plan.json"))
    (tmp_path / "plan.json").write_text(json.dumps(one))
    assert ran_two_batches(tmp_path, config, 30), "a later choice hides no earlier one"
    assert not ran_two_batches(tmp_path, config, 31)
    of_one = with_batch_of_a_rank(config, config, halves=False).data.global_batch_size
    of_half = with_batch_of_a_rank(config, config, halves=True).data.global_batch_size
    assert (of_one, of_half) == (16, 8)


@pytest.mark.parametrize(
    ("resumed", "dated"), [(5, [[5, 2]]), (20, [[9, 1], [20, 2]]), (40, [[9, 1], [30, 2]])]
)
def test_a_run_resumed_from_before_its_choice_has_the_chosen_number_from_there(
    resumed, dated, tmp_path
):
    path = tmp_path / "plan.json"
    choice, _ = Machine(120.0, 1.0, 1.05).chosen(Schedule("top_k"), (2,))
    one = plan_to_json(replace(choice, batches=1), {}, 9)
    path.write_text(json.dumps(plan_to_json(choice, {}, 30, one)))
    callback = AdaptiveSchedule(auto=True, chunks=(2,), plan=path)
    callback.planner = Planner(nn.ModuleList(), None, torch.device("cpu"))
    trainer: Any = SimpleNamespace(
        global_step=resumed,
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda kept: kept),
    )
    with patch.multiple(Planner, run_as=lambda *_: None, end_step=lambda *_: None):
        assert callback.take_kept_plan(trainer, callback.planner)
        assert in_flight_from(read_json(path)) == dated
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert in_flight_from(read_json(path)) == dated
