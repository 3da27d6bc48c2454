"""A counted step has what the estimate computes: bytes of collectives and states exactly, a peak
below the bound."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.predict.costs import check, counted_step, estimate, load_for
from scmoe.predict.counted_step import Counting, StepCounts

TINY, RANKS, SAMPLES = "configs/model/gpt3_moe_xl_tiny.yaml", 16, 8
CASES = {
    "replicated": "moe.noisy=true strategy.ep_size=4 schedule.chunks=2",
    "replicated, recompute": "trainer.recompute=true trainer.precision=bf16-mixed",
    "chunks": "schedule.chunks=8 trainer.precision=bf16-mixed",
    "two batches": "schedule.batches_in_flight=2 schedule.chunks=2 trainer.precision=bf16-mixed",
    "buffers, two batches": (
        "moe.capacity_factor=null moe.rows=buffers moe.dropless_ceiling=1.5"
        " trainer.precision=bf16-mixed schedule.batches_in_flight=2"
    ),
    "dgmoe-share": "moe.architecture=dgmoe_share model.layers=4",
    "buffers": (
        "moe.capacity_factor=null moe.rows=buffers moe.dropless_ceiling=1.5"
        " trainer.precision=bf16-mixed"
    ),
    "sharded": "strategy.dense=sharded",
    "hybrid": (
        "model.layers=4 strategy.dense=hybrid strategy.ep_size=4 trainer.precision=bf16-mixed"
    ),
    "hybrid, recompute": "strategy.dense=hybrid trainer.recompute=true model.layers=4",
}
# of the fault suite: what they hold, others hold together with something else
ALSO = ("chunks", "buffers", "two batches", "replicated, recompute")


@pytest.fixture(autouse=True)
def no_process_group():
    """Other tests of this process may have left theirs."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.faults if c in ALSO else ()) for c in CASES]
)
def test_a_counted_step_has_what_the_estimate_computes(case):
    words = ["data.name=synthetic", "model.layers=2", *CASES[case].split()]
    config = load_for(TINY, RANKS, SAMPLES, words)
    run, facts = counted_step(config), estimate(config)
    memory = facts["memory_bytes"]
    assert run.collectives == facts["collectives_bytes"]
    for state in ("weights", "gradients", "optimizer"):
        assert getattr(run, state) == memory[state]
    assert 0.97 < memory["total"] / sum(run.peak.values()) < 1.4
    if (
        not config.trainer.recompute and config.moe.rows != "buffers"
    ):  # else the estimate is an upper bound
        assert run.flops == pytest.approx(
            facts["flops_training"] * SAMPLES * config.data.seq_len, rel=1e-3
        )


def test_counting_equals_torchs_tracker_where_its_hooks_hold_nothing():
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        x, tracker, counts = torch.zeros(128, 64), MemTracker(), StepCounts()
        counts.add([x, *model.parameters()])
        tracker.track_external(model, x)
        with tracker, Counting(counts.note):
            model(x).sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert counts.peak.total() == peak > 128 * 64 * 4


def test_a_config_for_cpus_is_counted_with_all_slots_and_the_command_says_so(capsys):
    assert call("estimate", "configs/debug.yaml", "--counted") == 0
    alone = capsys.readouterr()
    assert call("estimate", "configs/debug.yaml", "--counted", "moe.rows=slots") == 0
    asked = capsys.readouterr()
    assert json.loads(alone.out) == json.loads(asked.out)
    assert "rank 0 of 1 ranks" in alone.err, "it is said before the work begins"
    assert "moe.rows=slots" in alone.err and "moe.rows=slots" not in asked.err
    assert call("estimate", "configs/debug.yaml", "--counted", "moe.rows=filled") == 2, (
        "it is not what was asked for"
    )


def test_the_ranks_of_an_estimate_are_given_in_one_way():
    for words in (
        ["ranks=8", "ep=2"],
        ["samples=2"],
        ["samples=2", "dp=4"],
        ["ep=1", "trainer={devices: 1}"],
        ["ranks=8", "data={global_batch_size: 8}"],
    ):
        assert call("estimate", "configs/debug.yaml", *words) == 2


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("trainer.devices=6", "ranks is 16"),
        ("trainer.devices=0", "trainer.devices is 0"),
        ("data.global_batch_size=16", "data.global_batch_size is given"),
        ("strategy.ep_size=16", "strategy.ep_size is 16"),
        ("moe.capacity_factor=null", "moe.capacity_factor is null"),
        ("trainer.accelerator=cpu", "moe.rows is 'auto'"),
        (
            "moe.capacity_factor=null moe.rows=buffers moe.dropless_ceiling=2",
            "trainer.precision is '32-true'",
        ),
        ("trainer.accumulate=2", "trainer.accumulate is 2"),
        ("strategy.dense=auto", "strategy.dense is 'auto'"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_a_line(words, refused):
    with pytest.raises(ConfigError, match=f"^[^\n]*{refused}[^\n]*$"):
        check(load_for(TINY, RANKS, 2, words.split()))


def test_a_sample_too_few_for_two_batches_in_flight_is_refused_with_what_the_command_takes():
    words = ["data.name=synthetic", "schedule.batches_in_flight=2"]
    with pytest.raises(ConfigError, match="samples=2 or more"):
        load_for(TINY, RANKS, 1, words)
    assert load_for(TINY, RANKS, 2, words).schedule.batches_in_flight == 2


def test_samples_are_those_of_a_rank_in_a_batch():
    words = ["data.name=synthetic", "trainer={accumulate: 2, devices: 1}"]
    config = load_for(TINY, RANKS, 3, words)
    assert config.data.global_batch_size == 2 * 3 * RANKS
    assert (config.trainer.devices, config.trainer.num_nodes) == (1, RANKS)
