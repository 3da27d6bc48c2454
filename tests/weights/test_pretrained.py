"""Checkpoints of other programs and exports are read, or refused by a message that names the cause.

test_families.py checks equality with transformers' own models; here folders are written by hand,
without that library.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, show
from scmoe.parallel.checkpoint.export import FORMAT_VERSION
from scmoe.training.assembly.model import build_model, build_model_to_train
from scmoe.weights.hf_config import hf_config, our_config
from scmoe.weights.pretrained import (
    READERS,
    check_settings,
    model_settings,
    read_config,
    read_export,
    resolved_settings,
)
from scmoe.weights.upcycle import fill
from tests.support.exports import FAMILIES, dense, export
from tests.support.models import tiny, tiny_model

LLAMA = {
    **{
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "vocab_size": 64,
    },
    **{
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    },
}


def llama_folder(folder: Path, **changes) -> dict[str, torch.Tensor]:
    """Write a folder as transformers would; return its tensors under transformers' names."""
    config = LLAMA | changes
    (folder / "config.json").write_text(json.dumps(config))
    _, _, names = READERS["llama"](LLAMA)
    model, tensors = tiny_model(dense("llama"), torch.float32), {}
    for ours, theirs in names.items():
        sizes = {3: [16, 8, 8], 2: [24, 24], 1: [len(model.get_parameter(ours))]}[len(theirs)]
        tensors |= dict(zip(theirs, model.get_parameter(ours).detach().split(sizes), strict=True))
    prefixed = {
        name if name == "lm_head.weight" else f"model.{name}": t.clone()
        for name, t in tensors.items()
    }
    save_file(prefixed, folder / "model.safetensors")
    return prefixed


def start(config: Config) -> torch.nn.Module:
    return build_model_to_train(config)


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as raised:
        start(config)
    message = str(raised.value)
    assert message.startswith("init_from is ") and "\n" not in message
    return message


# ---------------------------------------------------------------------- what is read


def assert_starts_from(config: Config, expected: torch.nn.Module) -> None:
    model = start(config)
    for name, p in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), p.float()), name


def test_a_folder_is_read(tmp_path):
    llama_folder(tmp_path)
    assert_starts_from(
        dense("llama", f"init_from=hf:{tmp_path}"), tiny_model(dense("llama"), torch.float32)
    )


@pytest.mark.parametrize("word", ["moe.architecture=dense", "moe.position=pos1"])
def test_an_export_of_the_same_architecture_is_read(word, tmp_path):
    expected = export(tiny(word), tmp_path / "model.safetensors")
    assert_starts_from(tiny(word, f"init_from=scmoe:{tmp_path}/model.safetensors"), expected)


# ---------------------------------------------------------------------- what is refused


def test_all_tensors_that_do_not_fit_are_named_at_once_and_nothing_is_written(tmp_path):
    tensors = llama_folder(tmp_path)
    del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.mlp.gate_proj.bias"] = torch.zeros(24)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(16, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    message = refusal(dense("llama", f"init_from=hf:{tmp_path}"))
    for part in (
        "layers.1.self_attn.k_proj.weight is missing",
        "lm_head.weight is missing",
        "layers.0.mlp.gate_proj.bias is unknown",
        "layers.0.mlp.down_proj.weight is (16, 32)",
    ):
        assert part in message
    assert message.count(";") == 3


def test_nothing_is_written_where_a_tensor_is_missing(tmp_path):
    file = tmp_path / "model.safetensors"
    export(dense("gpt", "model.layers=4"), file)
    model = build_model(dense("gpt"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"blocks\.2\.sublayers\.0\.f\.out\.bias is unknown"):
        fill(model, read_export(file))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("shape", [(), (24,), (24, 16, 1)], ids=str)
@pytest.mark.parametrize("words", ["architecture=dense", "architecture=top_k top_k=2"])
def test_a_tensor_of_other_dimensions_is_refused_by_name(words, shape, tmp_path):
    tensors, overrides = llama_folder(tmp_path), [f"moe.{word}" for word in words.split()]
    for name in ("mlp.down_proj", "mlp.up_proj", "post_attention_layernorm"):
        name = f"layers.1.{name}.weight"
        save_file({**tensors, f"model.{name}": torch.zeros(shape)}, tmp_path / "model.safetensors")
        message = refusal(tiny(*FAMILIES["llama"], *overrides, f"init_from=hf:{tmp_path}"))
        assert name in message and str(tuple(shape)) in message


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"num_attention_heads": 4}, (), "model.heads is 2, allowed: 4"),
        (
            {"num_key_value_heads": 2},
            ("data.vocab_size=65",),
            "model.kv_heads is 1, allowed: 2; data.vocab_size is 65",
        ),
        ({}, ("model.activation=gelu",), "model.activation is 'gelu', allowed: 'swiglu'"),
        ({}, ("model.family=gpt",), "model.family is 'gpt', allowed: 'llama'"),
        ({"rope_theta": 500000.0}, (), "model.rope_theta is 10000.0, allowed: 500000.0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            (),
            "rope_type is 'llama3'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            (),
            "rope_type is 'linear', allowed: 'default'",
        ),
        ({"rms_norm_eps": 1e-6}, (), "model.norm_eps is 1e-05, allowed: 1e-06"),
        ({"attention_bias": True}, (), "attention_bias is True, allowed: False"),
        ({"model_type": "mistral"}, (), "model_type is 'mistral', allowed: gpt2, llama"),
        ({"num_hidden_layers": None}, (), "config.json is not that of a llama"),
        ({"num_attention_heads": 0}, (), "config.json is not that of a llama"),
    ],
)
def test_settings_that_shapes_do_not_show_are_checked(changes, overrides, said, tmp_path):
    llama_folder(tmp_path, **changes)
    assert said in refusal(dense("llama", f"init_from=hf:{tmp_path}", *overrides))


@pytest.mark.parametrize("family", ("mixtral", "qwen2_moe"))
def test_an_moe_of_transformers_has_a_plain_router(family):
    """No shape shows the scale of the weights."""
    sizes = {
        "num_local_experts": 6,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    }
    settings, problems, _ = READERS[family](
        {**LLAMA, **sizes, "shared_expert_intermediate_size": 24}
    )
    assert not problems
    with pytest.raises(ValueError, match=r"moe\.router_scale is 2\.0, allowed: 1\.0"):
        check_settings(resolved_settings(tiny("moe.router_scale=2")), settings)


def test_a_model_with_zero_experts_keeps_them(tmp_path):
    file, words = tmp_path / "model.safetensors", ("moe.top_k=2", "moe.zero_experts=3")
    trained = export(tiny(*words), file)
    start = f"init_from=scmoe:{file}"
    assert "moe.zero_experts is 4, allowed: 3" in refusal(
        tiny(words[0], "moe.zero_experts=4", start)
    )
    model = build_model_to_train(tiny(*words, start))
    for name, p in trained.named_parameters():
        assert torch.equal(model.get_parameter(name), p.float()), name


def test_a_folder_without_a_readable_checkpoint_is_refused(tmp_path):
    config = dense("llama", f"init_from=hf:{tmp_path}")
    assert "config.json" in refusal(config)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(config)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert "has no weights in *.safetensors" in refusal(config)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert "model.safetensors cannot be read" in refusal(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**5},
        {"model_type": "deepseek_v3", "first_k_dense_replace": 10**9},
        {"model_type": "mixtral", "num_local_experts": 10**6},
        {"model_type": "scmoe", "scmoe": {"model": {"layers": 10**5}}},
    ],
)
def test_a_config_with_far_too_many_layers_is_refused_before_it_is_read(changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(ValueError, match="layers"):
        read_config(tmp_path, ("scmoe", *READERS))


def test_a_file_that_a_killed_export_has_left_is_not_read(tmp_path):
    llama_folder(tmp_path)
    (tmp_path / ".tmp-0123abcd-model.safetensors").write_bytes(b"half a header")
    assert_starts_from(
        dense("llama", f"init_from=hf:{tmp_path}"), tiny_model(dense("llama"), torch.float32)
    )


def test_an_export_of_another_format_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"tokens.weight": torch.zeros(1)}, file)
    assert "has format version None, allowed: 2" in refusal(dense("gpt", f"init_from=scmoe:{file}"))
    for header in ({}, {"settings": "{"}, {"settings": "3"}):
        save_file(
            {"tokens.weight": torch.zeros(1)},
            file,
            metadata={"format_version": FORMAT_VERSION, **header},
        )
        assert "its header does not hold the model's settings" in refusal(
            dense("gpt", f"init_from=scmoe:{file}")
        )


CHANGES = (
    "model.dim=32 model.heads=4 model.layers=4 model.ffn_dim=48 model.activation=gelu_tanh"
    " data.vocab_size=65 moe.num_experts=8 moe.top_k=2 moe.architecture=dense"
    " moe.architecture=shared_expert moe.position=pos1 moe.first_position=pos1 moe.combine=cg2"
    " moe.coefficient_input=tap moe.tap_norm=shared moe.noisy=true"
)


@pytest.mark.parametrize("change", CHANGES.split())
def test_an_export_into_another_model_is_refused_by_key(change, tmp_path):
    """Shapes do not show it: with another position or number of heads all tensors fit, and give
    another model."""
    file, key = tmp_path / "model.safetensors", change.partition("=")[0]
    export(tiny(), file)
    message = refusal(tiny(change, f"init_from=scmoe:{file}"))
    came, allowed = (show(resolved_settings(config)[key]) for config in (tiny(change), tiny()))
    assert came != allowed and f"{key} is {came}, allowed: {allowed}" in message


def test_settings_that_do_not_define_the_model_may_differ(tmp_path):
    """Keys of the training, and keys that this architecture does not read, may differ."""
    file, top_2 = tmp_path / "model.safetensors", ("moe.architecture=top_k", "moe.top_k=2")
    export(tiny(*top_2), file)
    start(
        tiny(
            *top_2,
            "moe.rows=filled",
            "moe.capacity_factor=null",
            "model.dropout=0.1",
            f"init_from=scmoe:{file}",
        )
    )


@pytest.mark.parametrize(
    "value", ["gpt2", "zip:file", "https://example.com/model", "scmoe:runs/latest/export/x"]
)
def test_other_sources_and_the_link_to_the_newest_run_are_refused(value, tmp_path):
    with pytest.raises(ConfigError, match="init_from is "):
        tiny(f"init_from={value}")
    tiny(f"runs_dir={tmp_path}", "init_from=scmoe:runs/latest/export/model.safetensors")


@pytest.mark.parametrize(
    ("family", "words", "said"),
    [
        (
            "llama",
            "architecture=top_k top_k=1",
            "requires moe.top_k >= 2 and weights that sum to one",
        ),
        ("llama", "architecture=top_k top_k=2 renormalise=false", "and weights that sum to one"),
        (
            "gpt",
            "architecture=top_k top_k=2",
            "experts have no biases, but the checkpoint's MLPs do",
        ),
        ("llama", "architecture=dgmoe", "moe.architecture top_k, shared_expert or scmoe"),
        ("gpt", "zero_experts=2", "requires moe.zero_experts=0"),
        ("gpt", "every=1 position=pos1 leading_dense=[24]", "and moe.leading_dense=[]"),
    ],
)
def test_a_model_that_cannot_be_upcycled_is_refused(family, words, said, tmp_path):
    file = tmp_path / "model.safetensors"
    export(dense(family), file)
    overrides = [f"moe.{word}" for word in words.split()]
    assert said in refusal(tiny(*FAMILIES[family], *overrides, f"init_from=scmoe:{file}"))


@pytest.mark.parametrize("words", ["schedule.batches_in_flight=2", "schedule.transfers=sequential"])
def test_a_folder_of_a_training_on_ranks_describes_a_model_of_one_process(words):
    config = tiny("trainer.devices=2", "schedule.chunks=2", words)
    read = our_config(hf_config(config, None), "config.json")
    assert model_settings(read) == model_settings(config)
    assert (read.schedule.chunks, read.schedule.batches_in_flight) == (2, None)
