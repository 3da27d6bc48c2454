"""On a GPU: transfers over its bus on a stream of their own, beside computation, change no bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from scmoe.moe.dispatcher import Blocking
from scmoe.moe.operators import Recorder
from scmoe.schedule.plan import Schedule
from scmoe.testbed.overlap import Bench, Setting, Variant
from scmoe.testbed.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
SMALL = dict(dim=64, ffn_dim=128, tokens=128, seq_len=32, compute="real", device="cuda", shaped=False)


def results(rank: int, world_size: int) -> dict[str, list[torch.Tensor]]:
    """Output and gradients of a ScMoE pair under several schedules."""
    dist.init_process_group("gloo")
    bench = Bench(Setting(0.5, rows=("scmoe_pos2",), **SMALL))
    found = {}
    for way, slot in [("sequential", 1), *(("overlapped", slot) for slot in range(4))]:
        step = bench.set(Variant("pos2", Schedule("pos2", slot), way))
        y = step.forward(bench.x)
        step.backward(y)
        gradients = [p.grad.cpu() for p in bench.stacks["pos2"][0].parameters() if p.grad is not None]
        found[f"{way} {slot}"] = [y.detach().cpu(), bench.x.grad.cpu(), *gradients]
        step.clear()
        bench.x.grad = None
    return found


def test_every_slot_equals_sequential_to_the_bit():
    found = run_ranks(results, 1)[0]
    expected = found.pop("sequential 1")
    for name, tensors in found.items():
        assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True)), name


def recorded(rank: int, world_size: int) -> list[str]:
    dist.init_process_group("gloo")
    bench = Bench(Setting(0.5, rows=("scmoe_pos2",), **SMALL))
    step = bench.set(Variant("pos2", Schedule("pos2", 1), "sequential"))
    block = bench.stacks["pos2"][0]
    assert isinstance(block.moe.dispatcher, Blocking)
    recorder = Recorder(bench.device)
    block.recorder = block.moe.recorder = recorder
    step.backward(step.forward(bench.x))
    spans = recorder.spans("forward")
    assert all(span.end >= span.start for span in spans)
    return [span.operator for span in spans]


def test_operators_are_timed_by_events():
    assert run_ranks(recorded, 1)[0] == ["attention", *Schedule("pos2", 1).operators()]
