"""Compiled sub-layers compute what others compute, with latent attention, zero experts and carries
too.

Each sub-layer must be one graph without a break. The graphs run without a C++ compiler's kernels;
fault 58 has those: torch.compile compiles again without end, or stops compiling without an error.
"""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from experiments.engine.ranks import run_ranks
from scmoe.blocks.sublayers import compile_sublayers
from scmoe.config.load import load_config
from scmoe.training.assembly.model import build_module
from tests.support.architectures import BETWEEN_BLOCKS, LATENT, LATENT_ATTENTION, overrides
from tests.support.cases import ROUTERS
from tests.support.models import assert_close, gradients, tiny, tiny_batch, tiny_model
from tests.support.trainings import fit
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


# ---------------------------------------------------------------------- fault 58

KINDS = ("attention", "MLP", "shared expert")


def both(rank: int, world_size: int, words: str) -> list[tuple[list[int], float, int]]:
    return [graphs(f"{words} trainer.compile={compiled}") for compiled in ("false", "true")]


def graphs(words: str) -> tuple[list[int], float, int]:
    """Train six steps with a validation after every second one. Return the number of graphs after
    each, the last loss, and the number of graph breaks."""
    config = load_config(
        "configs/debug.yaml", [*words.split(), "trainer.max_steps=6", "trainer.val_every=2"]
    )
    torch.manual_seed(1)
    module, counts = build_module(config), list[int]()
    module.on_validation_end = lambda: counts.append(counters["stats"]["unique_graphs"])  # type: ignore
    trainer = fit(config, module=module)
    return (
        counts,
        float(trainer.callback_metrics["train/loss"]),
        sum(counters["graph_break"].values()),
    )


LATENT_WITH_ZERO_EXPERTS = f"model.family=llama {LATENT} moe.router=longcat moe.zero_experts=2"


@pytest.mark.ranks
@pytest.mark.faults
@pytest.mark.parametrize(
    "words",
    ["model.layers=4", "model.family=llama trainer.recompute=true", LATENT_WITH_ZERO_EXPERTS],
)
def test_nothing_is_compiled_again_after_the_first_validation(words):
    """Each kind of part has a graph with gradients and one without, for any number of layers."""
    (none, plain, _), (counts, loss, breaks) = run_ranks(both, 1, words, timeout_s=280)[0]
    assert counts == [2 * len(KINDS)] * 3 and breaks == 0
    assert none == [0] * 3 and loss == pytest.approx(plain, rel=1e-5)
