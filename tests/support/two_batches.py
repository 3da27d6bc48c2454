"""This module compares two batches in flight with one, in one model and on one batch of data."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode

from scmoe.models.run_as import run_as, schedule_of
from scmoe.moe.balance import integer_sums
from tests.support.models import assert_close, gradients

EVEN = ("model.ffn_dim=32", "data.seq_len=16")
DROPLESS = ("moe.capacity_factor=null", *EVEN)
ROUTERS = {
    "deepseek": "router=deepseek top_k=3 bias_rate=0.1",
    "longcat router": "router=longcat top_k=3 zero_experts=4 bias_rate=1",
    "retrofit": "router=deepseek top_k=3 bias_rate=0.1 zero_experts=4",
}


class EqualRows(TorchDispatchMode):
    """Inside, a row of a product does not depend on the number of rows: MKL has another kernel for
    the last one to three rows. Rows of zeros fill up the first factor to a multiple of 8. The sizes
    in EVEN do the same for functions of single entries, of which the last few are computed one by
    one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func not in (aten.mm.default, aten.mm.out, aten.addmm.default):
            return func(*args, **(kwargs or {}))
        *bias, first, second = args
        filled = pad(first, (0, 0, 0, -len(first) % 8))
        product = torch.addmm if bias else torch.mm
        result = product(*bias, filled, second)[: len(first)]
        return kwargs["out"].copy_(result) if func is aten.mm.out else result


def run_batches(model: nn.Module, number: int) -> None:
    """Let a model run so many batches in flight."""
    run_as(model, replace(schedule_of(model), batches_in_flight=number))


def loss_of(output: Any, labels_BS: Tensor) -> Tensor:
    """Return a loss that every sum of the routers changes, too."""
    loss = cross_entropy(output.logits_BSV.flatten(0, 1), labels_BS.flatten())
    return loss + sum(s.score_sums_E.square().sum() + s.z_sum for s in output.stats)


def assert_equal(
    model: nn.Module, ids_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor | None = None
) -> None:
    """Assert that outputs and the routers' numbers of copies are bit-identical, and gradients are
    within 1e-12, where sums are in another order."""
    outputs, grads = [], []
    for batches in (1, 2):
        run_batches(model, batches)
        model.zero_grad()
        with EqualRows():
            outputs.append(model(ids_BS, mask_BS))
        loss_of(outputs[-1], labels_BS).backward()
        grads.append(gradients(model))
    one, two = outputs
    assert torch.equal(one.logits_BSV, two.logits_BSV)
    assert torch.equal(integer_sums(one.stats), integer_sums(two.stats))
    for name, gradient in grads[0].items():
        assert_close(grads[1][name], gradient, what=name)
