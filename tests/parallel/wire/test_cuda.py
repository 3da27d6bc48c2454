"""On a GPU, transfers in parallel with computation change no bit, and with fixed capacity the host
never waits.

Experts equal those on a CPU, NCCL's All-to-All of one rank changes no bit, and the planner measures
with events. test_no_host_sync.py and test_experts.py also test the parts that require no GPU. What
trains a bench here runs on a CPU too, so that a mistake in it is found without a GPU.
"""

import pytest
import torch
import torch.distributed as dist

from experiments.bench import emulated
from experiments.bench.rank_bench import Bench
from experiments.bench.setting import Setting
from experiments.bench.stacks import Variant
from experiments.engine.ranks import run_ranks
from scmoe.moe.dispatcher import Blocking, Dispatcher, LocalDispatcher
from scmoe.moe.experts import Experts
from scmoe.moe.layout import choose_rows
from scmoe.moe.recorder import Recorder
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher, Transfer
from scmoe.schedule.cost import slots
from scmoe.schedule.schedule import Schedule
from tests.support.models import assert_close, gradients, randomise

ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
)
SMALL = dict(dim=64, ffn_dim=128, tokens=128, seq_len=32, compute="real", links="bus")
on_any_device = pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=ON_GPU)))


def gpu(test):
    """Mark a test that needs a GPU."""
    for mark in ON_GPU:
        test = mark(test)
    return test


def small_bench(device: str) -> Bench:
    dist.init_process_group("gloo")
    return Bench(Setting(0.5, rows=("scmoe_pos2",), device=device, **SMALL))


def results(rank: int, world_size: int, device: str) -> dict[str, list[torch.Tensor]]:
    """Return output and gradients of a ScMoE pair under several schedules."""
    bench = small_bench(device)
    found = {}
    for way, slot in [("sequential", 1), *(("overlapped", slot) for slot in range(4))]:
        step = bench.set(Variant("pos2", Schedule("scmoe", "pos2", slot), way))
        y = step.model(bench.x)
        step.backward(y, torch.ones_like(y))
        gradients = [
            p.grad.cpu() for p in bench.stacks["pos2"][0].parameters() if p.grad is not None
        ]
        found[f"{way} {slot}"] = [y.detach().cpu(), bench.x.grad.cpu(), *gradients]
        step.model.zero_grad()
        bench.x.grad = None
    return found


@pytest.mark.ranks
@on_any_device
def test_every_slot_is_bit_identical_to_sequential(device):
    found = run_ranks(results, 1, device)[0]
    expected = found.pop("sequential 1")
    for name, tensors in found.items():
        assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True)), name


def recorded(rank: int, world_size: int, device: str) -> list[str]:
    bench = small_bench(device)
    recorder = Recorder(bench.device)
    step = bench.set(Variant("pos2", Schedule("scmoe", "pos2", 1), "sequential"), recorder)
    assert isinstance(bench.stacks["pos2"][0].moe.dispatcher, Blocking)
    step.train(bench.x)
    spans = recorder.spans("forward")
    assert all(span.end >= span.start for span in spans)
    return [span.operator for span in spans]


@on_any_device
def test_operators_are_timed_by_events(device):
    assert run_ranks(recorded, 1, device)[0] == [
        "attention",
        *Schedule("scmoe", "pos2", 1).operators(),
    ]


def steps_without_host_waits(
    rank: int, world_size: int, schedule: Schedule, way: str, autocast: bool
) -> None:
    """Raise RuntimeError if the host waits for the device, except in the first step, which
    allocates and compiles."""
    bench = small_bench("cuda")
    step = bench.set(Variant("pos2", schedule, way))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = step.model(bench.x)
        step.backward(y, torch.ones_like(y))
        step.model.zero_grad()
    torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("way", ("overlapped", "sequential"))
@pytest.mark.parametrize(
    "schedule", (Schedule("scmoe", "pos2", 1), Schedule("scmoe", "pos2", 2, 4)), ids=str
)
def test_with_fixed_capacity_the_host_never_waits_for_the_device(schedule, way, autocast):
    run_ranks(steps_without_host_waits, 1, schedule, way, autocast)


@gpu
@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
@pytest.mark.parametrize("counts", (None, [5, 0, 7, 4]), ids=("equal", "counted"))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)]
)
def test_experts_equal_those_on_a_cpu(dtype, tolerance, counts, activation):
    """In float64 the sums have another order. float32 and bfloat16 round, as in test_experts.py."""
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        module = randomise(Experts(16, 24, 4, activation=activation)).to(device, kind)
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = x.to(device, kind).requires_grad_()
        y = module(x, None if counts is None else torch.tensor(counts, device=device))
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad, **gradients(module)})
    host, gpu = found
    for name, expected in host.items():
        assert_close(gpu[name].cpu().double(), expected, tolerance, name)


def planned(rank: int, world_size: int) -> None:
    bench = small_bench("cuda")
    (choice,) = bench.choose("pos2", (1, 2)).layers
    assert list(choice.times) == [1, 2]
    for times in choice.times.values():
        for direction in (times.forward, times.backward):
            assert all(
                direction[op] > 0
                for op in ("route", "encode", "dispatch", "experts", "combine", "attention")
            )
    assert choice.schedule in [
        s for c in (1, 2) for s in slots(Schedule("scmoe", "pos2", chunks=c))
    ]


@gpu
def test_the_planner_measures_with_events():
    run_ranks(planned, 1)


def over_nccl(rank: int, world_size: int, factor: float | None, chunks: int) -> None:
    """Assert that a module's outputs and gradients through an All-to-All of one rank are
    bit-identical to those without it."""
    dist.init_process_group("nccl")
    torch.cuda.set_device(0)

    def outcome(dispatcher: Dispatcher) -> list[torch.Tensor]:
        experts = randomise(Experts(16, 24, 8))
        stream = MoEStream(
            randomise(Router(16, 8, 2)), experts, dispatcher, choose_rows(factor)
        ).to("cuda")
        x = (
            torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
            .to("cuda")
            .requires_grad_()
        )
        y = stream(x, None, chunks).y_BSD
        y.square().sum().backward()
        return [y.detach(), x.grad, *gradients(stream).values()]

    local, sent = outcome(LocalDispatcher()), outcome(AllToAllDispatcher(dist.group.WORLD, 8))
    assert all(torch.equal(a, b) for a, b in zip(local, sent, strict=True))
    dist.destroy_process_group()


@gpu
@pytest.mark.parametrize("chunks", (1, 3))
@pytest.mark.parametrize("factor", (1.5, None), ids=("fixed capacity", "dropless"))
def test_nccl_with_one_rank_changes_no_bit(factor, chunks):
    run_ranks(over_nccl, 1, factor, chunks)


@gpu
def test_buffers_in_flight_are_not_allocated_again():
    """An allocation during a transfer never gets the memory of sent or received rows, forward or
    backward."""
    device = torch.device("cuda")
    exchange = emulated.over_the_bus(device)
    rows = torch.randn(4096, 1024, device=device, requires_grad=True)
    expected, factor = rows.detach().cpu(), torch.randn(4096, 1024)

    def overwrite() -> None:
        for _ in range(4):
            torch.full((4096, 1024), float("nan"), device=device)

    transfer = Transfer(exchange).start(rows * 1.0)  # only the transfer refers to what is sent
    overwrite()
    arrived = transfer.wait()
    overwrite()
    assert torch.equal(arrived.detach().cpu(), expected)
    arrived.backward(factor.to(device))
    overwrite()
    assert torch.equal(rows.grad.cpu(), factor)

    for _ in range(2):  # no Transfer refers to the buffers here
        target, work = exchange(rows.detach() * 1.0, None)
        overwrite()
        work.wait()
        assert torch.equal(target.cpu(), expected)
