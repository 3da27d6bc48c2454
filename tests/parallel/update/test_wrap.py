"""All code that trains wraps its model with `wrap`: the Strategy, the step of the benches, and
`data_parallel`. Their gradients are those of one process, in float64 up to the order of sums.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scmoe.parallel.mesh import Mesh
from scmoe.parallel.update.wrap import wrap

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
