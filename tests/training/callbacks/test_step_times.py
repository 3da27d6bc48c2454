"""The times of a step, its FLOP/s and MFU mean what their names say, and nothing waits for a
device."""

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scmoe.models.model_cost import BF16_TFLOPS, forward_flops, peak_tflops
from scmoe.training.callbacks.step_times import StepTimes
from scmoe.training.callbacks.throughput import Throughput
from tests.support.models import tiny, tiny_model


class Device:
    """A stream of events. Each takes a second, and the device has passed those before `at`."""

    def __init__(self) -> None:
        self.recorded, self.at = 0, 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(place=None)

        def record() -> None:
            self.recorded += 1
            event.place = self.recorded

        def elapsed_time(end: Any) -> float:
            assert end.place < self.at, "the host would wait for the device"
            return 1e3 * (end.place - event.place)

        event.record, event.elapsed_time, event.query = (
            record,
            elapsed_time,
            lambda: event.place < self.at,
        )
        return event


class Logged:
    """A module and a trainer that keep what is logged."""

    def __init__(
        self, device: str = "cpu", accumulate: int = 1, log_every: int = 1, world_size: int = 1
    ) -> None:
        self.device, self.rows = torch.device(device), []
        self.accumulate_grad_batches, self.log_every_n_steps = accumulate, log_every
        self.world_size, self.precision = world_size, "32-true"
        self.model: Any = None
        self.global_step = 2**24 + 1

    def log(self, name: str, value: float, **_: Any) -> None:
        self.rows.append({name: value})

    def log_dict(self, row: dict[str, float]) -> None:
        self.rows.append(row)


def batch(times: StepTimes, logged: Any, batch_idx: int, clock: Any = lambda seconds: None) -> None:
    clock(0.5)
    times.on_train_batch_start(logged, logged, None, batch_idx)
    clock(1)
    times.on_before_backward(logged, logged, SimpleNamespace(device=logged.device))
    clock(2)
    times.on_after_backward(logged, logged)
    clock(3)
    times.on_train_batch_end(logged, logged, None, None, batch_idx)


def test_on_a_host_each_stage_has_its_time(monkeypatch):
    """Two batches make a step, whose stages are added up. Validation and checkpoints are no part of
    a stage."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def clock(seconds: float) -> None:
        now[0] += seconds

    times, logged = StepTimes(), Logged(accumulate=2, log_every=2)
    for i in range(4):
        batch(times, logged, i, clock)
        if i == 1:
            times.on_validation_start()
            clock(100)
    (row,) = logged.rows
    expected = {
        "time/data_ms": 1000,
        "time/forward_ms": 2000,
        "time/backward_ms": 4000,
        "time/update_ms": 6000,
    }
    assert row == pytest.approx(expected)


def test_on_a_device_nothing_waits_and_the_last_update_counts_later(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    times, logged = StepTimes(), Logged("cuda")
    for i in range(3):
        device.at = device.recorded + 4  # the guard of an update has waited for its gradients
        batch(times, logged, i)
    stages = [sorted(name for name in row if name != "time/data_ms") for row in logged.rows]
    reduced = ["time/backward_ms", "time/forward_ms"]
    assert stages == [reduced, [*reduced, "time/update_ms"], [*reduced, "time/update_ms"]]
    assert all(
        value == pytest.approx(1000)
        for row in logged.rows
        for name, value in row.items()
        if "data" not in name
    )
    assert len(times.spans["update"]) == 1, "spans are dropped once they are counted"


def test_an_event_that_passes_while_a_step_is_logged_counts_at_the_next_log(monkeypatch):
    """Each event has passed when it is asked for the second time."""

    def event(enable_timing: bool) -> Any:
        answers = iter([False])
        return SimpleNamespace(
            record=int, elapsed_time=lambda end: 1e3, query=lambda: next(answers, True)
        )

    monkeypatch.setattr(torch.cuda, "Event", event)
    times, logged = StepTimes(), Logged("cuda")
    for i in range(2):
        batch(times, logged, i)
    assert ["time/forward_ms" in row for row in logged.rows] == [False, True]
    assert [len(spans) for spans in times.spans.values()] == [1, 1, 1]


def test_model_flops_have_no_empty_slots():
    words = "model.layers=2 moe.num_experts=4 moe.top_k=2 moe.architecture=top_k"
    slots, dropless = (
        forward_flops(
            tiny_model(tiny(*words.split(), f"moe.capacity_factor={c}", "moe.rows=auto")),
            12,
            empty_slots=False,
        )
        for c in ("2", "null")
    )
    assert slots == dropless


def test_throughput_is_the_rate_times_the_flops_of_a_sample(monkeypatch):
    """Two ranks share the batch of 4 sequences, so each device has half of its FLOPs."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    logged = Logged(world_size=2)
    logged.model = tiny_model(tiny("model.layers=2"))
    callback = Throughput(4, 12, peak=1e-6)
    callback.on_train_start(logged, logged)
    for i in range(3):
        callback.on_train_batch_start()
        now[0] += 2.0
        callback.on_train_batch_end(logged, logged, None, None, i)
    tflops = (
        3 * sum(forward_flops(logged.model, 12, empty_slots=False).values()) * 4 / 2 / 2.0 / 1e12
    )
    row = {name: value for each in logged.rows[-2:] for name, value in each.items()}
    assert row["time/tokens_per_s"] == pytest.approx(4 * 12 / 2.0)
    assert row["time/model_tflops"] == pytest.approx(tflops)
    (tokens,) = [row["train/tokens"] for row in logged.rows[-3:] if "train/tokens" in row]
    assert tokens == (2**24 + 1) * 4 * 12, "float32 would round it"
    assert row["time/mfu"] == pytest.approx(tflops / 1e-6)
    assert callback.utilisation(callback.mean) == pytest.approx(
        {"model_tflops": tflops, "mfu": tflops / 1e-6}
    )
    assert callback.utilisation(None) == {"model_tflops": None, "mfu": None}


@pytest.mark.parametrize(
    ("device", "precision", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", True),
        ("NVIDIA H100 80GB HBM3", "32-true", False),
        ("NVIDIA H100", "bf16-mixed", False),  # another variant of a card has another peak
        ("NVIDIA GeForce RTX 4090", "bf16-true", False),
        (None, "bf16-mixed", False),  # a CPU
    ],
)
def test_a_peak_is_known_or_absent(device, precision, known):
    found = peak_tflops(device, precision)
    assert found == (BF16_TFLOPS[device] if known else None)
    assert found is None or (math.isfinite(found) and found > 0)


def test_a_save_inside_a_batch_does_not_end_the_run():
    """A user's callback may save when a batch starts, after Throughput has begun to count."""
    logged = Logged()
    logged.model = tiny_model(tiny("model.layers=2"))
    callback = Throughput(4, 12)
    callback.on_train_start(logged, logged)
    for i in range(2):
        callback.on_train_batch_start()
        callback.on_save_checkpoint()
        callback.on_train_batch_end(logged, logged, None, None, i)
    assert callback.mean is not None and callback.mean > 0
    callback.on_save_checkpoint()
    assert callback.started is None, "between two batches the time of a save is left out"
