"""SwinV2-MoE equals the oracle in logits, load-balance loss and all gradients, for every
architecture.

The tolerance is 1e-12 of the largest entry in float64, for the reasons in
test_reference_equality.py.
"""

import pytest
import torch
import torch.nn.functional as F

from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.models.model_cost import count_parameters, total_and_active
from scmoe.moe.balance import integer_sums, load_balance_loss
from scmoe.training.assembly.model import build_model, build_model_on_meta
from tests.reference_swin import SwinAnswer, SwinSpec, swin
from tests.support.architectures import SWIN_WITH_ORACLE, overrides, with_marks
from tests.support.models import assert_close, gradients, tiny_model

TINY = (
    *(
        "model.family=swin",
        "model.layers=2",
        "model.dim=8",
        "model.heads=1",
        "model.patch_size=2",
        "model.window=2",
    ),
    *("moe.num_experts=4", "data.name=digits", "data.image_size=32", "data.num_classes=5"),
)


def tiny(words: str, *further: str) -> Config:
    return load_config(None, [*TINY, *overrides(words), *further])


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(
        2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def spec_of(config: Config) -> SwinSpec:
    model, moe = config.model, config.moe
    return SwinSpec(
        moe.architecture,
        model.layers,
        model.heads,
        model.patch_size,
        model.window,
        moe.top_k,
        moe.position,
        moe.first_position,
        moe.combine,
        moe.coefficient_input,
        moe.every,
        moe.capacity_factor,
        moe.distinct_experts,
    )


def total(logits: torch.Tensor, balance: torch.Tensor | None) -> torch.Tensor:
    loss = F.cross_entropy(logits, torch.tensor([1, 3]))
    return loss if balance is None else loss + 0.5 * balance


TIGHT = ("top-2", "pos2", "dgmoe")
# of the fault suite: test_reference_equality.py has these wirings in GPT
ALSO = (
    *("top-2-every-block", "shared-every-block", "scmoe-every-block"),
    *("shared-cg2-top-2", "scmoe-2-pos1", "dgmoe-pos1"),
)
QUICK = [name for name in SWIN_WITH_ORACLE if name not in ALSO]


@pytest.mark.parametrize(
    "architecture",
    [*with_marks(QUICK), *(pytest.param(name, marks=pytest.mark.faults) for name in ALSO)],
)
def test_architecture_equals_oracle(architecture):
    equals_oracle(architecture, "null")


@pytest.mark.parametrize(
    "architecture",
    [*TIGHT, *(pytest.param(n, marks=pytest.mark.faults) for n in ("shared-cg2-top-2", "scmoe-2"))],
)
def test_architecture_with_a_capacity_equals_oracle(architecture):
    assert sum(equals_oracle(architecture, "1.0").dropped) > 0, (
        "without drops the case would not test them"
    )


def equals_oracle(architecture: str, capacity: str) -> SwinAnswer:
    config = tiny(SWIN_WITH_ORACLE[architecture], f"moe.capacity_factor={capacity}")
    model = tiny_model(config)
    logits, stats = model(images())
    balance = load_balance_loss(stats, integer_sums(stats)) if stats else None
    total(logits, balance).backward()
    grads = gradients(model)

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    answer = swin(weights, spec_of(config), images())
    total(answer.logits, answer.load_balance_loss).backward()

    assert_close(logits, answer.logits, 1e-12, "logits")
    if balance is not None:
        assert_close(balance, answer.load_balance_loss, 1e-12, "load_balance_loss")
    for name, weight in weights.items():
        assert_close(grads[name], weight.grad, 1e-12, name)
    assert [s.num_dropped.item() for s in stats] == answer.dropped
    return answer


@pytest.mark.parametrize(
    "change", [{"position": "pos1"}, {"combine": "direct_add"}, {"window": 4}], ids=str
)
def test_a_wrong_oracle_is_detected(change):
    config = tiny("position=pos2 combine=cg2", "moe.capacity_factor=null")
    model = tiny_model(config)
    wrong = swin(dict(model.named_parameters()), spec_of(config)._replace(**change), images())
    assert (model(images()).logits_BC - wrong.logits).abs().max() > 1e-3


def test_the_residual_stream_is_in_float32_under_autocast():
    model, types = build_model(tiny("architecture=dense")), []
    for module in (*model.blocks, model.norm):
        module.register_forward_pre_hook(lambda _, inputs: types.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(images().float())
    assert {*types} == {torch.float32} and len(types) > 4


def test_filler_is_routed_nowhere():
    """An image next to filler has the same logits as alone, even with a capacity; only its tokens
    are counted."""
    model = tiny_model(tiny("architecture=scmoe", "moe.capacity_factor=1"))
    logits, stats = model(images(), torch.tensor([True, False]))
    alone, alone_stats = model(images()[:1])
    assert_close(logits[:1], alone, 1e-12)
    assert torch.equal(integer_sums(stats), integer_sums(alone_stats))


def test_the_model_begins_as_patches_and_head():
    """SwinV2's norms after the sub-layers start with weight 0, so every block adds 0 at first."""
    model = build_model(tiny("architecture=scmoe")).double()
    x_BHWD = model.patches(images())
    for block in model.stages[0]:
        assert torch.equal(block(x_BHWD, None).y_BSD, x_BHWD)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_drop_path_grows_from_zero_to_the_last_block():
    model = build_model(tiny("architecture=dense", "model.drop_path=0.7"))
    rates = [block.sublayers[0].after.drop_path.drop_prob for block in model.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.parametrize("size, dim, heads, million", [("s", 96, 3, 157), ("b", 128, 4, 279)])
def test_presets_have_table_9s_shape(size, dim, heads, million):
    """157M is the paper's number for SwinV2-MoE-S without shared experts (A.7); it has none for B:
    279M is ours."""
    config = load_config(
        f"configs/model/swinv2_moe_{size}.yaml", ["moe.architecture=top_k", "moe.top_k=2"]
    )
    assert (config.data.image_size, config.model.window, config.moe.capacity_factor) == (
        192,
        12,
        1.25,
    )
    model = build_model_on_meta(config)
    counts = count_parameters(model)
    assert round(total_and_active(counts)[0] / 1e6) == million
    assert counts["experts"][0] == 10, "nine MoE modules in stage 3, one in stage 4"
    attentions = [m for name, m in model.named_modules() if name.endswith("f.attention")]
    assert [m.num_heads for m in attentions] == [heads] * 2 + [2 * heads] * 2 + [4 * heads] * 18 + [
        8 * heads
    ] * 2
    assert [m.dim for m in attentions[::2]] == [dim, 2 * dim, *[4 * dim] * 9, 8 * dim]
    assert [m.window_size[0] for m in attentions] == [12] * 22 + [6] * 2, "stage 4's map is 6 x 6"


def test_a_model_requires_its_own_kind_of_data():
    for words in (["data.name=digits"], ["model.family=swin"]):
        with pytest.raises(ValueError, match=r"data\.name is"):
            load_config(None, words)
    for key, value in (("model.ffn_dim", "8"), ("moe.tap_norm", "shared"), ("data.seq_len", "9")):
        with pytest.raises(ValueError, match=f"{key} is .* has (no )?images"):
            tiny("", f"{key}={value}")
    for words, key in (("data.image_size=40", "image_size"), ("model.window=3", "model.window")):
        with pytest.raises(ValueError, match=key):
            tiny("", words)
    with pytest.raises(ValueError, match=r"inside_attention is .* attention that is one operator"):
        tiny("", "schedule.inside_attention=true")
    with pytest.raises(ValueError, match=r"data\.mixup is .* has (no )?images"):
        load_config(None, ["data.mixup=0.5"])
    with pytest.raises(ValueError, match=r"global_batch_size is 30, allowed: a multiple of 4"):
        tiny("", "data.mixup=0.5", "data.global_batch_size=30", "trainer.devices=2")
