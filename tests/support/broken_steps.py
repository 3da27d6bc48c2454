"""These faults are put into a training step of tests/support/fake_steps.py, which must raise."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from scmoe.blocks.sublayers import MLP
from scmoe.moe.experts import Experts, batched_mlps
from scmoe.moe.router import Router
from scmoe.parallel.mesh import Mesh
from scmoe.training.modules import MoEModule

READ = "the host reads a number of the device"
Fault = Callable[[], AbstractContextManager[Any]]


def after(owner: type, name: str, spoil: Callable[[Any], Any]) -> Fault:
    """Return a fault that passes the results of a method through `spoil`."""
    original = getattr(owner, name)
    return lambda: patch.object(
        owner, name, lambda *args, **kwargs: spoil(original(*args, **kwargs))
    )


def in_place_of(owner: Any, name: str, function: Callable[..., Any]) -> Fault:
    return lambda: patch.object(owner, name, function)


def clip_after_a_look(parameters: Any, max_norm: float, norm: torch.Tensor) -> None:
    if norm > max_norm:
        for p in parameters:
            p.grad.mul_(max_norm / norm)


def without_a_common_dtype(self: Experts, rows_RD: torch.Tensor, counts_e: None) -> torch.Tensor:
    with torch.autocast("cuda", enabled=False):
        return batched_mlps(rows_RD, self.w_in_eDF, self.w_out_eFD, counts_e, self.act)


def drawn_on_the_device(self: Experts, key: str, std_in: float, std_out: float) -> None:
    for weight, std in ((self.w_in_eDF, std_in), (self.w_out_eFD, std_out)):
        weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator()) * std)


def sum_on_the_host(self: Mesh, x: torch.Tensor) -> torch.Tensor:
    return x.cpu().to(x.device)


def times_float64(y_TE: torch.Tensor) -> torch.Tensor:
    return y_TE @ torch.eye(y_TE.shape[-1], dtype=torch.float64, device=y_TE.device)


def log_a_number(self: MoEModule, name: str, value: torch.Tensor) -> None:
    self.log(name, 0.5)


def log_for_the_bar(self: MoEModule, name: str, value: torch.Tensor) -> None:
    self.log(name, value, prog_bar=True)


def new_tensor(*shape: int) -> torch.Tensor:
    """Return a tensor whose device was forgotten."""
    return torch.zeros(shape)


FAULTS: dict[str, tuple[Fault, str]] = {  # the fault, and what the error must say
    "y.max().item()": (after(Router, "logits", lambda y: y + y.max().item()), READ),
    "ids.tolist()": (after(Router, "choose", lambda ids: ids.new_tensor(ids.tolist())), READ),
    "if loads.any()": (
        after(MoEModule, "global_sums", lambda sums: sums if sums[0].any() else None),
        READ,
    ),
    "if norm > max_norm": (
        in_place_of(torch.nn.utils, "clip_grads_with_norm_", clip_after_a_look),
        READ,
    ),
    "log(0.5)": (
        in_place_of(MoEModule, "log_of_step", log_a_number),
        "a number of the host is logged",
    ),
    "log(loss, prog_bar=True)": (
        in_place_of(MoEModule, "log_of_step", log_for_the_bar),
        "the progress bar reads",
    ),
    "y[y > 0]": (
        after(MLP, "forward", lambda y: y + y[y > 0].sum()),
        "DynamicOutputShapeException",
    ),
    "x.cpu().to(device)": (
        in_place_of(Mesh, "sum_over_ranks", sum_on_the_host),
        "uses cpu and cuda",
    ),
    "a row without a device": (
        after(MLP, "forward", lambda y: y + new_tensor(y.shape[-1])),
        "two devices",
    ),
    "a number without a device": (
        after(MLP, "forward", lambda y: y * new_tensor()),
        "uses cpu and cuda",
    ),
    "experts without a dtype": (
        in_place_of(Experts, "forward", without_a_common_dtype),
        "but found torch.float32",
    ),
    "a weight without a dtype": (
        after(Router, "logits", times_float64),
        "multiplies torch.float32 and torch.float64",
    ),
    "a generator of the host": (
        in_place_of(Experts, "init_weights", drawn_on_the_device),
        "uses cpu and cuda",
    ),
}
