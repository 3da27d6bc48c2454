"""Both language models pass the same tests: maximum length, mixed precision."""

from copy import deepcopy

import pytest
import torch

from scmoe.parallel.dense.fsdp_units import exact_parameters
from tests.support.models import gradients, tiny, tiny_batch, tiny_model

FAMILIES = {"gpt": (), "llama": ("model.family=llama", "model.kv_heads=1")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_longer_sequence_is_refused(family):
    with pytest.raises(
        ValueError, match=r"a sequence has 13 tokens, allowed: up to data\.seq_len, 12"
    ):
        tiny_model(tiny(*FAMILIES[family]))(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("capacity", ("null", "1.0"))
def test_mixed_precision(capacity, family):
    """bf16 rounds to 4e-3, about a dozen times in a forward pass; losses, weights and gradients
    stay float32."""
    config = tiny(*FAMILIES[family], "moe.top_k=2", f"moe.capacity_factor={capacity}")
    model, (ids, _) = tiny_model(config, torch.float32), tiny_batch(config)
    exact = model(ids).logits_BSV
    with torch.autocast("cpu", torch.bfloat16):
        logits, (stats,) = model(ids)
    assert (logits.float() - exact).norm() < 0.1 * exact.norm()
    # the median, since a token whose two best experts tie may go to the other one
    assert (logits.float() - exact).abs().median() < 0.05 * exact.std()
    (logits.float().square().mean() + stats.score_sums_E.square().sum() + stats.z_sum).backward()
    assert stats.score_sums_E.dtype == stats.z_sum.dtype == torch.float32
    assert all(
        grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model).values()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_gathered_in_bfloat16_leave_the_residual_stream_in_float32(family):
    """Sharded weights are. The stream through many blocks then rounds no more than with replicated
    weights."""
    config = tiny(*FAMILIES[family], "moe.architecture=dense", "model.layers=24", "data.seq_len=64")
    model, (ids, _) = tiny_model(config, torch.float32), tiny_batch(config)
    gathered = deepcopy(model)
    for p in {*gathered.parameters()} - exact_parameters(gathered):
        p.data = p.data.bfloat16()
    types = []
    for module in (*gathered.blocks, gathered.norm):
        module.register_forward_pre_hook(lambda _, inputs: types.append(inputs[0].dtype))
    exact = model(ids).logits_BSV
    with torch.autocast("cpu", torch.bfloat16):
        sharded, replicated = ((m(ids).logits_BSV - exact).norm() for m in (gathered, model))
    assert {*types} == {torch.float32}
    assert sharded < 1.3 * replicated
