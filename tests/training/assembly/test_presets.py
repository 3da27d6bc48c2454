"""The models of Tables 8 and 9 have the right sizes, and build with every kind of block that fits.

tests/experiments/tables/test_table_file.py builds the rows of Tables 1 to 7. Those of
LongCat-Flash, Instella-MoE, NVIDIA and NousResearch have one architecture each."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scmoe.config.load import load_config
from scmoe.models.model_cost import count_parameters, total_and_active
from scmoe.training.assembly.model import build_model, build_model_on_meta
from tests.support.architectures import KINDS, TABLES, overrides
from tests.support.models import randomise

MODELS = Path(__file__).parents[3] / "configs/model"
LANGUAGE = ("gpt2_moe_small", "gpt2_moe_medium", "gpt3_moe_xl", "llama2_moe")
NAMES = (*LANGUAGE, "swinv2_moe_s", "swinv2_moe_b")
OF_KINDS = {name: TABLES[name] for name in KINDS}
AT_POS1 = {  # with an MoE in every block there is no other position
    name.replace("pos2", "pos1"): words.replace("pos2", "pos1")
    for name, words in OF_KINDS.items()
    if "pos1" not in name and "pos3" not in name
}
FIRST_OF_A_FAMILY = ("gpt2_moe_small", "llama2_moe", "swinv2_moe_s")
FAMILY = ("longcat_flash", "instella_moe", "nvidia_shortcut", "nous")
CASES = [  # every kind at one size of each family, and three at its other sizes
    (name, architecture, words)
    for name in NAMES
    for architecture, words in (AT_POS1 if name == "llama2_moe" else OF_KINDS).items()
    if name in FIRST_OF_A_FAMILY or architecture in ("top-2", "pos2", "dgmoe-share")
]
CASES += [(name, "own", "") for name in FAMILY]


def preset(name: str, words: str):
    """Read a preset; of the words only those of the section moe are used, since a preset has its
    own layers."""
    if name.startswith("swin"):
        pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    no_tap = ["moe.position=pos2"] if re.search("top_k |shared_expert", words) else []
    return load_config(
        MODELS / f"{name}.yaml", [*no_tap, *(w for w in overrides(words) if w.startswith("moe."))]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "words"), CASES, ids=[f"{n}-{a}" for n, a, _ in CASES]
)
def test_architecture_builds_and_its_twin_learns(name, architecture, words):
    """The twin is the same model at a small size: the same modules, and every weight has a
    gradient."""
    counts = count_parameters(build_model_on_meta(preset(name, words)))
    twin = build_model(preset(f"{name}_tiny", words))
    twin_counts = count_parameters(twin)
    assert twin_counts.keys() == counts.keys()
    assert all(twin_counts[kind][1] < counts[kind][1] for kind in counts)
    generator = torch.Generator().manual_seed(0)
    if name.startswith("swin"):
        # its norms start with weight 0, so the modules before them would have zero gradients
        randomise(twin)
        inputs = torch.randn(2, 3, 16, 16, generator=generator)
    else:
        inputs = torch.randint(512, (1, 32), generator=generator)
    logits, stats = twin(inputs)
    (logits.square().mean() + sum(s.score_sums_E.square().sum() for s in stats)).backward()
    assert not [
        parameter for parameter, p in twin.named_parameters() if p.requires_grad and p.grad is None
    ]


@pytest.mark.parametrize("name", (*NAMES, *FAMILY))
def test_a_twin_differs_in_sizes_only(name):
    """The paper's keep heads and experts. The others keep the share of zero experts."""
    whole, twin = preset(name, ""), preset(f"{name}_tiny", "")
    sizes = (
        ("num_experts", "zero_experts", "top_k", "ffn_dim", "leading_dense")
        if name in FAMILY
        else ()
    )
    heads = () if name in FAMILY else ("heads", "kv_heads")
    assert replace(whole.moe, **{key: getattr(twin.moe, key) for key in sizes}) == twin.moe
    for moe in (whole.moe, twin.moe):
        assert moe.zero_experts * 2 in (0, moe.num_experts)
    for key in ("scaled", "gated", "yarn_factor"):
        assert getattr(whole.model.latent, key) == getattr(twin.model.latent, key), key
    for key in ("family", "attention", "norm_eps", "rope_theta", "activation", *heads):
        assert getattr(whole.model, key) == getattr(twin.model, key), key


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2_moe_small", 322.6),  # Table 8: 323M
        ("gpt2_moe_medium", 1866.0),  # Table 8: 1.7B, see docs/decisions/0010-table-8-sizes.md
        ("gpt3_moe_xl", 4134.4),  # Table 8: 4.1B
        (
            "llama2_moe",
            6725.0,
        ),  # Table 8: 6.7B, with the ffn_dim of docs/decisions/0011-llama2-moe.md
    ],
)
def test_size_of_standard_top_2(name, millions):
    total, _ = total_and_active(
        count_parameters(build_model_on_meta(preset(name, TABLES["top-2"])))
    )
    assert round(total / 1e6, 1) == millions
