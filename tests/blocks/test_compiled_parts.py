"""Compiled sub-layers compute what others compute, with latent attention, zero experts and carries
too.

Each sub-layer must be one graph without a break. The graphs run without a C++ compiler's kernels;
tests/blocks/test_compile_faults.py has those.
"""

from functools import partialmethod

import pytest
import torch
from torch import nn

from scmoe.blocks.sublayers import compile_sublayers
from scmoe.training.assembly.model import build_module
from tests.support.architectures import BETWEEN_BLOCKS, LATENT_ATTENTION, overrides
from tests.support.cases import ROUTERS
from tests.support.models import assert_close, gradients, tiny, tiny_batch, tiny_model
from tests.support.two_batches import run_batches

pytestmark = pytest.mark.slow

CASES = {name: f"{LATENT_ATTENTION[name]} model.family=llama" for name in ("longcat", "instella")}
CASES |= {"zero experts": ROUTERS["longcat router"], **BETWEEN_BLOCKS}


@pytest.mark.parametrize("name", CASES)
def test_compiled_parts_compute_what_others_compute(name, monkeypatch):
    config = tiny("moe.capacity_factor=null", *overrides(CASES[name]))
    plain, compiled = tiny_model(config), tiny_model(config)
    one_graph = partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", one_graph)
    torch._dynamo.reset()
    assert compile_sublayers(compiled) > 0
    ids, labels = tiny_batch(config)
    outputs = list[torch.Tensor]()
    for model in (plain, compiled):
        logits = model(ids).logits_BSV
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        outputs.append(logits)
    assert_close(*outputs)
    expected = gradients(plain)
    for parameter, gradient in gradients(compiled).items():
        assert_close(gradient, expected[parameter], what=parameter)


def test_no_half_is_left_uncompiled(monkeypatch):
    """Torch would leave a function uncompiled that has more graphs than the budget allows. Halves
    of odd batches have two sizes, and that of one sequence is empty."""
    config = tiny("moe.capacity_factor=null", "moe.architecture=top_k", "model.layers=2")
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    limits = {"recompile_limit": 8, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        module = build_module(config)
        module.compiled = True
        module.configure_model()
        run_batches(module.model, 2)
        for size in (3, 1, 2, 5):
            ids, _ = tiny_batch(config, size)
            module.model(ids).logits_BSV.sum().backward()
            with torch.no_grad():
                module.model(ids)
