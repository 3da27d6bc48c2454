"""What a user has measured becomes factors on computing and transfers, or is refused."""

import gzip
import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest

from experiments.bench.overlap.speedups import operators_ms
from experiments.bench.setting import Setting
from scmoe.config.leaves import ConfigError
from scmoe.predict.advise import advise
from scmoe.predict.advised_rows import Simulator, Slowdown
from scmoe.predict.asked_config import read_asked
from scmoe.predict.cluster import overridden, read_profile
from scmoe.predict.judged_job import Request
from scmoe.predict.measured_times import (
    known_choice,
    seconds_of_trace,
    sizes_as_benched,
    slowdown_of_file,
    slowdowns_of_step,
)
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.play import TRANSFERS
from tests.support.advised import QUICK_WORDS, counted_on, quickstart_on_cards


@pytest.fixture(scope="module")
def counted():
    return quickstart_on_cards()


def test_a_measured_step_says_what_was_slow_in_two_ways(counted):
    """Both machines take that long; the interval holds what either says."""
    profile, job, models = counted
    job = job._replace(ep_sizes=(8,), sizes=job.sizes._replace(rows=64))
    simulator = Simulator(profile.machine(), job)
    model, choice = known_choice([*models.values()], job, 8)
    assert (model.name, choice.ep_size) == ("scmoe_pos2", 8)
    usual = simulator.step(model, choice).total
    computing, transfers = slowdowns_of_step(simulator, model, choice, 3 * usual)
    assert computing.transfers == 1 and computing.computing > 2
    assert transfers.computing == 1 and transfers.transfers > 3
    for scale in (computing, transfers):
        again = Simulator(profile.machine(), job, scale).step(model, choice).total
        assert again == pytest.approx(3 * usual, rel=1e-3)
    compared = [model for name, model in models.items() if name != "top1"]
    both = advise(compared, profile, job, [computing, transfers]).verdict["two_batches"]
    each = [
        advise(compared, profile, job, [scale]).verdict["two_batches"]
        for scale in (computing, transfers)
    ]
    assert both.interval[0] == min(step.interval[0] for step in each)
    assert both.interval[1] == max(step.interval[1] for step in each)
    with pytest.raises(ConfigError, match="measured_step_ms"):
        slowdowns_of_step(simulator, model, choice, 1e-9)


def trace(computing_us, transfers_us):
    """Return a trace of two steps, in each of which a transfer runs beside half of a product."""
    events = [{"name": f"ProfilerStep#{step}", "cat": "user_annotation"} for step in (3, 4)]
    for start in (0, 10_000):
        events += [
            {"name": "gemm", "cat": "kernel", "ts": start, "dur": computing_us},
            {
                "name": "ncclDevKernel_SendRecv(x)",
                "cat": "kernel",
                "ts": start + computing_us / 2,
                "dur": transfers_us,
            },
            {"name": "ncclDevKernel_AllReduce", "cat": "kernel", "ts": start, "dur": 9_000},
        ]
    return {"traceEvents": events}


def test_a_trace_says_how_long_a_step_computes_and_exchanges(counted, tmp_path):
    file = tmp_path / "trace.json"
    assert seconds_of_trace(trace(4000, 500)["traceEvents"], file) == (0.004, 0.0005)
    profile, job, models = counted
    simulator = Simulator(profile.machine(), job)
    model, choice = known_choice([*models.values()], job, 8)
    file.write_text(json.dumps(trace(4000, 500)), encoding="utf-8")
    scale = slowdown_of_file(file, simulator, [*models.values()], 8)
    step = simulator.step(model, choice)
    assert scale.computing == pytest.approx(0.004 / (step.computing + step.update))
    packed = file.with_suffix(".json.gz")  # as trainer.profile_steps writes it
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert slowdown_of_file(packed, simulator, [*models.values()], 8) == scale
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="cannot be read"):
        slowdown_of_file(packed, simulator, [*models.values()], 8)
    file.write_text(json.dumps({"traceEvents": []}), encoding="utf-8")
    with pytest.raises(ConfigError, match="0 steps and 0 kernels"):
        slowdown_of_file(file, simulator, [*models.values()], 8)


def test_a_trace_says_nothing_of_the_host_s_time(counted, tmp_path):
    """Kernels that take as long as predicted leave a step with much time of the host as it is."""
    profile, job, models = counted
    machine = overridden(profile, ["cluster.fixed_ms=50"]).machine()
    simulator = Simulator(machine, job)
    model, choice = known_choice([*models.values()], job, 8)
    quick = Simulator(profile.machine(), job).step(model, choice)
    kernels_s = quick.computing + quick.update
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(trace(3e6 * kernels_s, 500)), encoding="utf-8")
    scale = slowdown_of_file(file, simulator, [*models.values()], 8)
    assert scale.computing == pytest.approx(3.0)
    slow = Simulator(machine, job, scale).step(model, choice)
    host = 2 * 0.05  # two blocks with an MoE
    assert slow.computing == pytest.approx(3 * quick.computing + host)


def test_a_trace_of_a_pipeline_is_refused(counted, tmp_path):
    """Its batches between stages are sent as rows are."""
    profile, job, models = counted
    staged = job._replace(sizes=job.sizes._replace(stages=2))
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(trace(4000, 500)), encoding="utf-8")
    with pytest.raises(ConfigError, match="stage_layers is given"):
        slowdown_of_file(file, Simulator(profile.machine(), staged), [*models.values()], 8)


@pytest.mark.parametrize(("own", "ep_size"), [("null", 8), ("2", 2)])
def test_what_was_measured_had_the_ep_of_the_config(own, ep_size, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: quickstart\nstrategy: {{ep_size: {own}}}\n", encoding="utf-8")
    request = Request(read_asked(file, QUICK_WORDS))
    job, models = counted_on(read_profile("8xH100"), request, "top2", "scmoe_pos2")
    assert known_choice([*models.values()], job, 8)[1].ep_size == ep_size


def test_an_ep_of_the_config_that_the_ranks_cannot_have_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: quickstart\nstrategy: {ep_size: 3}\n", encoding="utf-8")
    request = Request(read_asked(file, QUICK_WORDS))
    job, models = counted_on(read_profile("8xH100"), request, "top2")
    with pytest.raises(ConfigError, match=r"strategy\.ep_size of the config is 3, allowed"):
        known_choice([*models.values()], job, 8)


def test_a_plan_says_how_long_its_operators_take(counted, tmp_path):
    """A plan whose operators take twice, and whose transfers three times, the predicted time."""
    profile, job, models = counted
    simulator = Simulator(profile.machine(), job)
    model, choice = known_choice([*models.values()], job, 8)
    blocks, _ = simulator.blocks(model, choice.ep_size)
    layers = [
        {
            "schedule": {"architecture": "scmoe", "position": "pos2", "expert_slot": 1},
            "times_s": {
                "1": {
                    direction: {
                        operator: (3 if operator in ("dispatch", "combine") else 2) * seconds
                        for operator, seconds in times.items()
                    }
                    for direction, times in (
                        ("forward", block.times.forward),
                        ("backward", block.times.backward),
                    )
                }
            },
            "sequential_s": [1.0, 1.0],
            "batches_in_flight": 1,
        }
        for block in blocks
    ]
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"layers": layers}), encoding="utf-8")
    scale = slowdown_of_file(file, simulator, [*models.values()], 8)
    assert scale == pytest.approx(Slowdown(2.0, 3.0, 2.0))
    file.write_text(json.dumps({"layers": layers[:1]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="1 blocks are not those"):
        slowdown_of_file(file, simulator, [*models.values()], 8)


def test_a_bench_s_report_says_how_long_the_operators_of_top2_take(counted, tmp_path):
    """A report whose operators take twice, and whose transfers three times, the predicted time."""
    profile, job, models = counted
    simulator = Simulator(profile.machine(), job)
    blocks, _ = simulator.blocks(models["top2"], 8)
    measured = OperatorTimes(
        *(
            {op: (3 if op in TRANSFERS else 2) * seconds for op, seconds in each.items()}
            for each in (blocks[0].times.forward, blocks[0].times.backward)
        )
    )
    of_job = sizes_as_benched(job, models["top2"])
    sizes = {name: value for name, value in of_job.items() if name not in ("row", "blocks")}
    setting = asdict(replace(Setting(None, link_mbit=200.0, ranks=8, compute="real"), **sizes))
    file = tmp_path / "report.json"

    def slowdown(**changed):
        report = {
            "setting": {**setting, **changed},
            "calibration": {"operators_ms": operators_ms(measured)},
        }
        file.write_text(json.dumps(report), encoding="utf-8")
        return slowdown_of_file(file, simulator, [*models.values()], 8)

    assert slowdown() == pytest.approx(Slowdown(2.0, 3.0, 2.0))
    filled = job._replace(config=replace(job.config, moe=replace(job.config.moe, rows="filled")))
    for each, name in ((job, "capacity:2"), (filled, "dropless")):
        assert sizes_as_benched(each, models["top2"])["layout"] == name
    recomputed = replace(job.config, trainer=replace(job.config.trainer, recompute=True))
    simulator = Simulator(profile.machine(), job._replace(config=recomputed))
    with pytest.raises(ConfigError, match="recomputes nothing"):
        slowdown()
    simulator = Simulator(profile.machine(), job)
    for changed, message in (
        ({"tokens": 512}, "bench of tokens=512, but the job has tokens=1024"),
        ({"layout": "dropless"}, "layout=dropless"),
        ({"link_mbit": None}, "--link-mbit"),
        ({"ranks": 1}, "allowed: 2 | 4 | 8"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            slowdown(**changed)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("moe.every=1", "moe.position=pos2"), ("scmoe_pos2", "top2")),
        (("moe.architecture=top_k", "moe.top_k=2"), ("top2", "top1")),
    ],
)
def test_what_was_measured_is_the_model_of_the_config(words, names):
    """Pos-2's tap is `carried` with an MoE in every block, and top-1 is standard as well."""
    request = Request(read_asked("quickstart", [*QUICK_WORDS, *words]))
    job, models = counted_on(read_profile("8xH100"), request, *names)
    assert known_choice([*models.values()], job, 8)[0].name == names[0]


def layers_of_plan(blocks: list[Any]) -> list[dict[str, Any]]:
    """Return the layers of a plan.json whose operators took what is predicted."""
    return [
        {
            "schedule": {"architecture": "scmoe", "position": "pos2", "expert_slot": 1},
            "times_s": {"1": asdict(block.times)},
            "sequential_s": [1.0, 1.0],
            "batches_in_flight": 1,
        }
        for block in blocks
    ]


def test_a_plan_is_compared_with_operators_as_scmoe_runs_them(counted, tmp_path):
    """scmoe has neither rows in 8 bits nor shared weights: the words of the job are not what was
    measured."""
    profile, job, models = counted
    model, choice = known_choice([*models.values()], job, 8)
    blocks, _ = Simulator(profile.machine(), job).blocks(model, choice.ep_size)
    layers = layers_of_plan(blocks)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"layers": layers}), encoding="utf-8")
    asked = job._replace(sizes=job.sizes._replace(sent=0.5, tensor_parallel=2))
    simulator = Simulator(profile.machine(), asked)
    scale = slowdown_of_file(file, simulator, [*models.values()], 8)
    assert scale == pytest.approx(Slowdown(1.0, 1.0))


@pytest.mark.parametrize(("key", "was"), [("precision", "32-true"), ("recompute", True)])
def test_a_plan_of_other_kernels_is_refused(key, was, counted, tmp_path):
    """The job is in bf16-mixed and computes nothing again."""
    profile, job, models = counted
    simulator = Simulator(profile.machine(), job)
    model, choice = known_choice([*models.values()], job, 8)
    blocks, _ = simulator.blocks(model, choice.ep_size)
    layers = layers_of_plan(blocks)
    file = tmp_path / "plan.json"
    plan = {"layers": layers, "conditions": {"ep_size": choice.ep_size, key: was}}
    file.write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"measured with trainer.{key}="):
        slowdown_of_file(file, simulator, [*models.values()], 8)
