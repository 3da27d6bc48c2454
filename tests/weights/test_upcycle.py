"""An MoE model that is upcycled from a dense one equals it, and learns.

The tolerance is 1e-12 in float64: the upcycled model adds up the same numbers in another order.
"""

import pytest
import torch

from scmoe.training.assembly.model import build_model
from scmoe.weights.pretrained import read_export
from scmoe.weights.upcycle import fill
from tests.support.architectures import overrides
from tests.support.exports import FAMILIES, dense, export
from tests.support.models import assert_close, tiny, tiny_batch

UPCYCLED = {
    "top-2": ("llama", "architecture=top_k top_k=2"),
    "top-2-every-block": ("llama", "architecture=top_k top_k=2 every=1"),
    "top-3": ("llama", "architecture=top_k top_k=3"),
    "shared-direct_add": ("gpt", "architecture=shared_expert combine=direct_add"),
    "shared-cg1": ("gpt", "architecture=shared_expert"),
    "shared-cg2": ("gpt", "architecture=shared_expert combine=cg2 top_k=2"),
    "pos1": ("gpt", "position=pos1"),
    "pos2": ("gpt", "position=pos2"),
    "pos2-shared-norm": ("gpt", "position=pos2 tap_norm=shared"),
    "pos3": ("llama", "position=pos3"),
    "l0-pos1": ("llama", "position=pos2 first_position=pos1"),
    "scmoe-2": ("gpt", "position=pos2 top_k=2"),
    "scmoe-every-block": ("llama", "position=pos1 every=1"),
    "pos3-every-fourth": ("llama", "position=pos3 every=4"),
}


@pytest.mark.parametrize(("family", "words"), UPCYCLED.values(), ids=UPCYCLED)
def test_upcycled_equals_dense_and_routed_experts_of_a_shared_one_learn_from_zero(
    family, words, tmp_path
):
    config, file = dense(family, "model.layers=4"), tmp_path / "model.safetensors"
    expected, (ids, _) = export(config, file), tiny_batch(config)
    config = tiny(
        *FAMILIES[family], *overrides(words), "model.layers=4", "moe.capacity_factor=null"
    )
    model = build_model(config).double()
    fill(model, read_export(file))
    logits, stats = model(ids)
    assert_close(logits, expected(ids).logits_BSV, 1e-12)
    assert all((s.counts_E > 0).sum() > 1 for s in stats), "more than one expert must be used"
    if words.startswith("architecture=top_k"):
        return
    logits.square().sum().backward()
    for block in model.blocks:
        experts = block.moe.experts
        assert not experts.w_out_eFD.any() and experts.w_out_eFD.grad.abs().max() > 0
        assert torch.equal(experts.w_in_eDF[0], experts.w_in_eDF[1]) and experts.w_in_eDF.any()


def test_a_dense_checkpoint_into_a_model_with_zero_experts_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    export(dense("gpt"), file)
    model = build_model(tiny("moe.zero_experts=2"))
    with pytest.raises(ValueError, match=r"moe\.zero_experts=0"):
        fill(model, read_export(file))
