"""Folders of GPT-2, LLaMA, LongCat-Flash, DeepSeek-V3 and Instella-MoE are read into a model that
equals theirs.

Logits and all gradients are equal to 1e-5 of the largest entry in float32. Instella's class is not
in transformers: the test wires the modules of DeepSeek-V3 by its equations. Every epsilon differs
from ours, so that a mix-up shows: that of latents' norms is 1e-6 whatever config.json says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import scmoe
from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.training.assembly.model import build_model_on_meta, build_model_to_train
from scmoe.weights import pretrained
from scmoe.weights.families import READERS
from scmoe.weights.hf_folder import write_folder
from scmoe.weights.pretrained import read_hf
from tests.support.exports import write_checkpoint
from tests.support.models import assert_close, gradients, one_of_two

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra `peers`)"
)
pytestmark = pytest.mark.peers

VOCABULARY, LENGTH, TOLERANCE = 50, 12, 1e-5
GPT2 = {
    **{
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_positions": LENGTH,
        "n_layer": 4,
        "n_embd": 16,
    },
    **{"n_head": 2, "n_inner": 24},
}
LLAMA = {
    **{
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "num_hidden_layers": 4,
    },
    **{
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    },
    **{"rms_norm_eps": 1e-2},
}
SIZES = {
    **{
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
    },
    **{
        "rms_norm_eps": 1e-2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
    },
    **{"n_routed_experts": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"},
}
LONGCAT = SIZES | {
    **{
        "model_type": "longcat_flash",
        "num_layers": 2,
        "q_lora_rank": 6,
        "head_dim": 4,
        "ffn_hidden_size": 32,
    },
    **{"expert_ffn_hidden_size": 24, "moe_topk": 2, "routed_scaling_factor": 6.0},
}
DEEPSEEK = SIZES | {
    **{
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 40,
    },
    **{
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5,
    },
    **{"n_group": 1, "topk_group": 1},
}
YARN = {
    **{
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
    },
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "longcat": LONGCAT | {"zero_expert_num": 0},
    "longcat, zero experts": (
        LONGCAT | {"zero_expert_num": 4, "rope_parameters": {**YARN, "rope_theta": 1e7}}
    ),
    "deepseek": DEEPSEEK | {"q_lora_rank": 6, "rope_theta": 50000.0},
    "instella": DEEPSEEK | {"q_lora_rank": None, "rope_parameters": YARN},
}
LATENT = {"kv_rank": 8, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
DATA = (
    "data.name=synthetic",
    f"data.vocab_size={VOCABULARY}",
    f"data.seq_len={LENGTH}",
    "moe.capacity_factor=null",
)
OUR_DENSE = ("model.layers=4", "model.dim=16", "model.ffn_dim=24", "moe.architecture=dense")
OUR_LLAMA = (
    *OUR_DENSE,
    "model.family=llama",
    "model.heads=4",
    "model.kv_heads=2",
    "model.norm_eps=1e-2",
)
OURS = (
    *(
        "model.family=llama",
        "model.attention=latent",
        "model.dim=16",
        "model.heads=2",
        "model.norm_eps=1e-2",
    ),
    *(f"model.latent.{key}={size}" for key, size in LATENT.items()),
    *("moe.num_experts=4", "moe.top_k=2", "moe.ffn_dim=24"),
)
OUR_LONGCAT = (
    *OURS,
    *(
        "model.layers=4",
        "model.ffn_dim=32",
        "model.latent.q_rank=6",
        "model.latent.scaled=true",
        "moe.router=longcat",
    ),
    *(
        "moe.router_scale=6",
        "moe.tap_norm=shared",
        "moe.combine=direct_add",
        "model.rope_theta=1e7",
    ),
)
OUR_DEEPSEEK = (
    *OURS,
    *(
        "model.layers=3",
        "model.ffn_dim=48",
        "moe.leading_dense=[40]",
        "moe.every=1",
        "moe.router=deepseek",
    ),
    "moe.router_scale=2.5",
)
SHARED_EXPERT = ("moe.architecture=shared_expert", "moe.combine=direct_add")
TURNED = ("model.rope_theta=10000", "model.latent.yarn_factor=40")
WORDS = {
    "gpt2": (*OUR_DENSE, "model.family=gpt", "model.heads=2", "model.activation=gelu_tanh"),
    "llama": OUR_LLAMA,
    "llama, tied": OUR_LLAMA,
    "longcat": OUR_LONGCAT,
    "longcat, zero experts": (*OUR_LONGCAT, "moe.zero_experts=4", "model.latent.yarn_factor=40"),
    "deepseek": (*OUR_DEEPSEEK, *SHARED_EXPERT, "model.latent.q_rank=6", "model.rope_theta=5e4"),
    "instella": (
        *OUR_DEEPSEEK,
        "moe.architecture=farskip",
        "model.latent.gated=true",
        "model.latent.yarn_factor=40",
    ),
}


def instella_logits(theirs: nn.Module, ids_BS: Tensor) -> Tensor:
    """Compute Instella-MoE's logits with the modules of DeepSeek-V3, each of whose attentions has
    a `gate_proj`."""
    body = theirs.model
    x = y = body.embed_tokens(ids_BS)
    angles = body.rotary_emb(x, torch.arange(ids_BS.shape[1])[None])
    for layer in body.layers:
        attended = gated(layer.self_attn, layer.input_layernorm(y), angles)
        u = layer.post_attention_layernorm(x)
        without_routed = layer.mlp.shared_experts if hasattr(layer.mlp, "experts") else layer.mlp
        x, y = x + attended + layer.mlp(u), x + attended + without_routed(u)
    return theirs.lm_head(body.norm(x))


def gated(attention: nn.Module, x_BSD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    gate = attention.gate_proj(x_BSD).sigmoid()
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * gate,))
    output = attention(hidden_states=x_BSD, position_embeddings=angles, attention_mask=None)[0]
    handle.remove()
    return output


@torch.no_grad()
def their_model(case: str) -> nn.Module:
    """Return a model of theirs in which every term shows: no norm has weight 1, and no selection
    bias is 0."""
    config = transformers.AutoConfig.for_model(**CASES[case])
    theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if case == "instella":
        for attention in (layer.self_attn for layer in theirs.model.layers):
            attention.gate_proj = nn.Linear(
                config.hidden_size, attention.o_proj.in_features, bias=False
            )
    generator = torch.Generator().manual_seed(0)
    for part, p in theirs.named_parameters():
        fresh = torch.randn(p.shape, generator=generator)
        p.copy_(1 + 0.3 * fresh if "norm" in part else 0.3 * fresh)
    for part, buffer in theirs.named_buffers():
        if part.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) / 10)
    return theirs


def save(theirs: nn.Module, folder: Path, case: str) -> None:
    theirs.save_pretrained(folder)
    if case == "instella":
        change(folder, architectures=["InstellaMoEForCausalLM"])


def change(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def config_of(case: str, folder: Path, *overrides: str) -> Config:
    return load_config(None, [*DATA, *WORDS[case], f"init_from=hf:{folder}", *overrides])


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Return a folder with one of theirs for each case."""
    made = tmp_path_factory.mktemp("folders")
    for case in CASES:
        save(their_model(case), made / case, case)
    return made


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, folders, tmp_path):
    theirs = their_model(case)
    ours = build_model_to_train(config_of(case, folders / case))
    logits = ours(ids()).logits_BSV
    their_logits = instella_logits(theirs, ids()) if case == "instella" else theirs(ids()).logits
    assert_close(logits, their_logits, TOLERANCE)
    assert_close(scmoe.load(folders / case)(ids()).logits_BSV, their_logits, TOLERANCE)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    (their_logits * weights).sum().backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    save(theirs, tmp_path, case)
    expected, found = read_hf(tmp_path), gradients(ours)
    if case == "llama, tied":  # ours are two weights with a gradient each
        found["tokens.weight"] = found["head.weight"] = (
            found["tokens.weight"] + found["head.weight"]
        )
    for name, grad in found.items():
        experts = [expected.read(name, e) for e in range(4)] if ".experts." in name else []
        their_grad = torch.stack(experts) if experts else expected.read(name, None)
        assert their_grad.abs().max() > 1e-3, name
        assert_close(grad, their_grad, TOLERANCE, name)


@pytest.mark.parametrize("case", ["longcat", "longcat, zero experts", "deepseek"])
def test_a_round_trip_changes_no_byte(case, folders, tmp_path):
    """What nothing reads is written as zeros: gate and up projections of zero experts."""
    theirs, config = their_model(case), config_of(case, folders / case)
    write_checkpoint(build_model_to_train(config), tmp_path / "step=3.ckpt", step=3)
    kind = write_folder(
        tmp_path / "step=3.ckpt", tmp_path / "out", config, build_model_on_meta(config)
    )
    assert kind == CASES[case]["model_type"]
    before, after = (
        load_file(folder / "model.safetensors") for folder in (folders / case, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    zero_experts = [f".experts.{e}." for e in range(4, 8)]
    for name, weight in before.items():
        expected = (
            torch.zeros_like(weight) if any(part in name for part in zero_experts) else weight
        )
        assert torch.equal(after[name], expected) and after[name].dtype == weight.dtype, name
    again = type(theirs).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(ids()).logits, theirs(ids()).logits)


def test_a_bare_model_in_several_files_with_fewer_positions_is_read(tmp_path):
    """The first GPT-2 files have names without a prefix; a model may use fewer positions."""
    theirs = their_model("gpt2")
    theirs.transformer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = build_model_to_train(config_of("gpt2", tmp_path, "data.seq_len=8"))
    assert_close(ours(ids()[:, :8]).logits_BSV, theirs(ids()[:, :8]).logits, TOLERANCE)


def test_a_rank_reads_only_its_own_experts(folders, monkeypatch):
    case, read, original = "longcat, zero experts", [], pretrained.TensorInFile.read
    whole = build_model_to_train(config_of(case, folders / case))

    def noted(stored: Any, row: int | None = None) -> Tensor:
        read.append(stored.name)
        return original(stored, row)

    monkeypatch.setattr(pretrained.TensorInFile, "read", noted)
    config = config_of(case, folders / case, "trainer.devices=2", "strategy.ep_size=2")
    with one_of_two() as wire:
        half = build_model_to_train(config, wire)
    of_experts = {name.split(".experts.")[1].split(".")[0] for name in read if ".experts." in name}
    assert of_experts == {"2", "3"} and len(read) == len(set(read))
    for name, p in half.named_parameters():
        expected = whole.get_parameter(name)
        assert torch.equal(p, expected[2:] if ".experts." in name else expected), name


def test_the_class_decides_where_no_type_is_declared(folders, tmp_path):
    shutil.copytree(folders / "longcat", tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    build_model_to_train(config_of("longcat", tmp_path))
    assert scmoe.load(tmp_path).max_seq_len == LENGTH


def test_further_modules_are_not_read(folders, tmp_path):
    """Published folders have modules that predict further tokens, which are neither read nor
    refused."""
    for case, name in (
        ("longcat", "model.mtp.norm.weight"),
        ("deepseek", "model.layers.3.eh_proj.weight"),
    ):
        folder = Path(shutil.copytree(folders / case, tmp_path / case))
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, name: torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
        build_model_to_train(config_of(case, folder))


@pytest.mark.parametrize(
    ("case", "changes", "words", "said"),
    [
        ("longcat", {"router_bias": True}, (), "router_bias is True, allowed: False"),
        (
            "longcat",
            {"zero_expert_type": "copy"},
            (),
            "zero_expert_type is 'copy', allowed: 'identity'",
        ),
        ("longcat", {"norm_topk_prob": True}, (), "norm_topk_prob is True, allowed: False"),
        ("longcat", {"head_dim": 8}, (), "head_dim is 8, allowed: 4"),
        ("longcat", {}, ("model.layers=2",), "model.layers is 2, allowed: 4"),
        ("longcat", {}, ("moe.zero_experts=2",), "moe.zero_experts is 2, allowed: 0"),
        ("longcat", {}, ("moe.tap_norm=own",), "moe.tap_norm is 'own', allowed: 'shared'"),
        ("longcat", {}, ("model.norm_eps=1e-5",), "model.norm_eps is 1e-05, allowed: 0.01"),
        (
            "longcat",
            {},
            ("model.rope_theta=10000",),
            "model.rope_theta is 10000.0, allowed: 10000000.0",
        ),
        (
            "deepseek",
            {"n_group": 8, "topk_group": 4},
            (),
            "n_group is 8, allowed: 1; topk_group is 4, allowed: 1",
        ),
        (
            "deepseek",
            {"architectures": ["KimiForCausalLM"]},
            (),
            "architectures is ['KimiForCausalLM'], allowed: ",
        ),
        (
            "deepseek",
            {"rope_parameters": YARN | {"beta_fast": 16}},
            TURNED,
            "beta_fast is 16, allowed: 32",
        ),
        (
            "deepseek",
            {"rope_parameters": YARN | {"mscale": None}},
            TURNED,
            "mscale is None, allowed: 1.0",
        ),
        (
            "instella",
            {"architectures": ["DeepseekV3ForCausalLM"]},
            SHARED_EXPERT,
            "model.latent.gated is true",
        ),
        (
            "instella",
            {"farskip_end_idx": 2},
            (),
            "farskip_end_idx is 2, allowed: num_hidden_layers or more",
        ),
        ("instella", {}, SHARED_EXPERT, "moe.architecture is 'shared_expert', allowed: 'farskip'"),
    ],
)
def test_another_model_is_refused_by_name(case, changes, words, said, folders, tmp_path):
    folder = Path(shutil.copytree(folders / case, tmp_path / "changed"))
    change(folder, **changes)
    with pytest.raises(ValueError, match="init_from is ") as raised:
        build_model_to_train(config_of(case, folder, *words))
    assert said in str(raised.value)


def test_a_ramp_of_yarn_that_is_not_rounded_is_refused():
    rope = {"q_lora_rank": 6, "rope_parameters": YARN | {"truncate": False}}
    _, problems, _ = READERS["deepseek_v3"](DEEPSEEK | rope)
    assert problems == ["truncate is False, allowed: True"]


def test_groups_of_experts_that_a_config_leaves_out_are_those_of_transformers():
    config = {key: value for key, value in DEEPSEEK.items() if not key.endswith("_group")}
    _, problems, _ = READERS["deepseek_v3"](config | {"q_lora_rank": 6})
    assert problems == ["n_group is 8, allowed: 1", "topk_group is 4, allowed: 1"]
