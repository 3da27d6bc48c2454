"""Times of variants that run in turn, round after round, by the device's own clock."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from scmoe.experiments.bench.gpu.runner import attempt

WARM_UP = 3  # rounds
Made = tuple[nn.Module, Tensor]  # a module and its input


def milliseconds(device: torch.device, call: Callable[[], object]) -> float:
    """Returns the time of one call: on a GPU that of its work there, the gaps between its kernels included."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


def in_turn(device: torch.device, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the milliseconds of each call in each round, after WARM_UP rounds that do not count."""
    times = [{name: milliseconds(device, call) for name, call in calls.items()} for _ in range(WARM_UP + rounds)]
    return {name: [of_round[name] for of_round in times[WARM_UP:]] for name in calls}


def forward_and_train(module: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Returns two calls: forward without gradients, and forward with backward into gradients that do not exist yet."""

    def output() -> Tensor:
        y = module(x)
        return y if isinstance(y, Tensor) else y.y_BSD

    def train() -> None:
        module.zero_grad()
        x.grad = None
        y = output()
        y.backward(torch.ones_like(y))

    return {"forward": torch.no_grad()(output), "train": train}


def compare(
    device: torch.device, variants: Mapping[str, Callable[[], Made]], over: Mapping[str, str], rounds: int
) -> dict[str, Any]:
    """Returns for each variant its median forward_ms and train_ms, and its ratios to the variant that `over` names.

    variants: functions that make a module and its input. One that cannot be made or run has its error instead.
    """
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, make in variants.items():

        def first(make: Callable[[], Made] = make) -> dict[str, Callable[[], object]]:
            own = forward_and_train(*make())
            for call in own.values():
                milliseconds(device, call)
            return own

        made = attempt(first)
        if "error" in made:
            found[name] = made
        else:
            calls |= {f"{name}: {kind}": call for kind, call in made.items()}
    times = in_turn(device, calls, rounds)
    for name in variants.keys() - found.keys():
        found[name] = {f"{kind}_ms": median(times[f"{name}: {kind}"]) for kind in ("forward", "train")}
    for name, other in over.items():
        if "error" in found[name] or "error" in found[other]:
            continue
        found[name]["over"] = other
        for kind in ("forward", "train"):
            pairs = zip(times[f"{name}: {kind}"], times[f"{other}: {kind}"], strict=True)
            found[name][f"{kind}_ratio"] = median(own / its for own, its in pairs)
    return {name: found[name] for name in variants}
