"""All code that trains wraps its model with `wrap`: the Strategy, the step of the benches, and
`data_parallel`. Their gradients are those of one process, in float64 up to the order of sums.
"""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.engine.ranks import run_ranks
from scmoe.api import MoE
from scmoe.parallel.mesh import Mesh, build_mesh, expert_parameters
from scmoe.parallel.update.wrap import wrap
from scmoe.parallel.wire.wire import Wire

pytestmark = pytest.mark.ranks


def test_on_a_gpu_ddp_is_built_on_the_stream_of_the_forward_pass(monkeypatch):
    """On another stream each gradient would wait for that one."""
    found = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: found.append("another stream"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(
        "scmoe.parallel.update.wrap.DistributedDataParallel", lambda *_, **__: found.append("ddp")
    )
    model = nn.Module()
    with FakeTensorMode():
        model.weight = nn.Parameter(torch.empty(8, device="cuda"))
    wrap(model, Mesh())
    assert found == ["ddp"]


def with_experts_alone(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    """Return the gradients of this rank's experts, of three batches of which two are not summed:
    where all parameters train, and where only experts do."""
    dist.init_process_group("gloo")
    mesh = build_mesh(1, torch.device("cpu"), timedelta(seconds=60))
    found = []
    for trains_dense in (True, False):
        torch.manual_seed(1)
        moe = MoE(16, 4, ffn_dim=32, group=Wire(mesh))
        moe.requires_grad_(trains_dense)
        moe.experts.requires_grad_()
        if rank > 0:  # dense weights become rank 0's
            with torch.no_grad():
                moe.router.gate.weight.mul_(2)
        wrapped = wrap(moe, mesh)
        batches = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(rank))
        for number, x_TD in enumerate(batches, 1):
            with nullcontext() if number == len(batches) else wrapped.no_sync():
                wrapped.backward(wrapped.module(x_TD)[0].square().mean())
        found.append([p.grad for _, p in expert_parameters(moe)])
    return found


def test_experts_train_alone_too():
    """DDP refuses a model whose other parameters do not train."""
    ranks = run_ranks(with_experts_alone, 2)
    for usual, alone in ranks:
        assert all(map(torch.equal, usual, alone))
    assert all(map(torch.equal, ranks[0][1], ranks[1][1]))
