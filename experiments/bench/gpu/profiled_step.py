"""Part step: the operators of a training step by the profiler, and where the host waits for the device.

With fixed capacity nothing of a step may wait; dropless the host reads the number of rows.
"""

from typing import Any

from scmoe.experiments.bench.gpu.events import device_work, host_waits, operator_ms, within
from scmoe.experiments.bench.gpu.gpu_models import GPT2_MOE_SMALL, tiny
from scmoe.experiments.bench.gpu.gpu_parts import Pieces, Place
from scmoe.experiments.bench.gpu.train_step import TrainStep
from scmoe.experiments.engine.profiles import events_of, recorded

PHASES = ("forward", "backward", "update")
WARM_UP = 3  # steps
SAMPLES = 8


def pieces(place: Place) -> Pieces:
    fixed = GPT2_MOE_SMALL.moe.capacity_factor
    return {
        "fixed capacity": lambda: profile_step(place, fixed, "step.json.gz", may_wait=False),
        "dropless": lambda: profile_step(place, None, None, may_wait=True),
    }


def profile_step(place: Place, capacity_factor: float | None, trace: str | None, may_wait: bool) -> dict[str, Any]:
    """Returns times and waits of one step. trace: a file's name, to keep the profile.

    RuntimeError: the host waited, or the profiler did not see the device."""
    config = tiny(GPT2_MOE_SMALL) if place.tiny else GPT2_MOE_SMALL
    step = TrainStep(config, place.torch_device, 2 if place.tiny else SAMPLES, capacity_factor)
    for _ in range(WARM_UP):
        step()
    found = events_of(recorded(place.torch_device, step), place.out / trace if trace else None)
    events = within(found, "step")
    waits = host_waits(events)
    if place.device == "cuda" and not device_work(events)["kernels"]:
        raise RuntimeError("the profiler has recorded no kernel of the step, so it cannot trace this device")
    if waits and not may_wait:
        raise RuntimeError(f"with fixed capacity the host waited for the device: {waits}")
    return {
        "samples": step.samples,
        "seq_len": config.data.seq_len,
        "host_waits": sum(waits.values()),
        "waits": waits,
        "operators_forward_ms": operator_ms(events),
        "phases": {phase: device_work(within(found, phase)) for phase in PHASES},
    }
