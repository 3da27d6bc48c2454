"""A model of type scmoe answers what the mixins of transformers' own tests ask of a model
(ModelTesterMixin, GenerationTesterMixin). They are not in its package, so these are their
questions, with Mixtral as a control.

Also what accelerate and PEFT do to a model. float64, so that sums of another order differ by 1e-12
only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import scmoe
from tests.support.hf_models import (
    GPT,
    KINDS,
    VOCABULARY,
    config_of,
    ids,
    logits,
    model_of,
    read,
    through_cache,
)
from tests.support.models import assert_close, kept_for_backward

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra `peers`)"
)
pytestmark = pytest.mark.peers
OTHERS = ("gpt", "latent", "farskip", "mixtral")  # `shared` has one module twice, and noise

# -------------------------------------------------- configuration, saving, sizes


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_sizes_under_transformers_names(kind):
    model = model_of(kind)
    config, cache = model.config, model(ids()).cache
    assert len(cache.layers) == config.num_hidden_layers
    for layer in cache.layers:
        assert layer.keys.shape == (2, config.num_key_value_heads, 10, config.head_dim or 4)
    assert config.hidden_size == 16 and config.vocab_size == VOCABULARY and config.use_cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_read_again_without_a_word(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    again, report = read(tmp_path, kind, output_loading_info=True, attn_implementation="sdpa")
    assert not any(report.values()), report
    assert torch.equal(logits(again), logits(model))
    assert again.config.to_diff_dict() == model.config.to_diff_dict()


def test_a_config_without_arguments_is_whole():
    from scmoe.hf import ScMoEConfig

    config = ScMoEConfig()
    assert (
        config.hidden_size == config.scmoe["model"]["dim"]
        and config.intermediate_size == 4 * config.hidden_size
    )


@pytest.mark.parametrize(
    "name", ["tie_word_embeddings", "hidden_size", "vocab_size", "attn_implementation"]
)
def test_a_config_that_the_settings_do_not_follow_is_refused(name):
    from scmoe.hf import ScMoEForCausalLM

    config = config_of(GPT)
    value = {"tie_word_embeddings": False, "attn_implementation": "eager"}.get(name, 32)
    setattr(config, "_attn_implementation" if name == "attn_implementation" else name, value)
    with pytest.raises(ValueError, match=name):
        ScMoEForCausalLM(config)


def test_a_folder_without_its_tied_embedding_is_reported(tmp_path):
    from safetensors.torch import load_file, save_file

    model_of("gpt").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert "model.tokens.weight" in report["missing_keys"]
    assert again.model.head.weight is again.model.tokens.weight and logits(again).isfinite().all()
    assert again.model.tokens.weight.std() < 0.03  # as for a new training


@pytest.mark.parametrize(
    ("kind", "vocabulary"),
    [
        ("gpt", VOCABULARY + 7),
        ("latent", VOCABULARY - 60),
        pytest.param("latent", VOCABULARY + 7, marks=pytest.mark.faults),
        pytest.param("mixtral", VOCABULARY - 60, marks=pytest.mark.faults),
        pytest.param("mixtral", VOCABULARY + 7, marks=pytest.mark.faults),
        pytest.param("gpt", VOCABULARY - 60, marks=pytest.mark.faults),
    ],
)
def test_token_embeddings_are_resized(kind, vocabulary, tmp_path):
    model, inputs = model_of(kind), ids() % 200
    before, kept = logits(model, input_ids=inputs), min(VOCABULARY, vocabulary)
    assert model.resize_token_embeddings(vocabulary) is model.get_input_embeddings()
    after = logits(model, input_ids=inputs)
    assert after.shape[-1] == model.config.vocab_size == vocabulary
    assert_close(after[..., :kept], before[..., :kept], 1e-12)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (kind == "gpt")
    model.save_pretrained(tmp_path)
    again = read(tmp_path, kind)
    assert torch.equal(logits(again, input_ids=inputs), after)
    if kind != "mixtral":
        assert_close(scmoe.load(tmp_path)(inputs).logits_BSV, after.float(), 1e-5)


# ---------------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_a_cache_changes_no_logits(kind):
    model = model_of(kind)
    assert_close(through_cache(model), logits(model), 1e-10)
    first = model(ids()[:, :4])
    rest = logits(model, input_ids=ids()[:, 4:], past_key_values=first.past_key_values)
    assert_close(rest, logits(model)[:, 4:], 1e-10)
    model.train()
    assert kind == "mixtral" or model(ids()).cache is None


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_embeddings_instead_of_ids(kind):
    model = model_of(kind)
    embeddings = model.get_input_embeddings()(ids())
    assert torch.equal(logits(model, input_ids=None, inputs_embeds=embeddings), logits(model))
    continued = {"max_new_tokens": 4, "do_sample": False}
    mask = torch.ones_like(ids())
    written = model.generate(inputs_embeds=embeddings, attention_mask=mask, **continued)
    assert torch.equal(
        written[:, -4:], model.generate(ids(), attention_mask=mask, **continued)[:, 10:]
    )
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(ids(), inputs_embeds=embeddings)


@pytest.mark.parametrize("kind", [*KINDS, "mixtral", "moe.every=4"])
def test_hidden_states_of_every_layer(kind):
    model = model_of(kind)
    output = model(ids(), output_hidden_states=True, logits_to_keep=1)
    states = output.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert all(state.shape == (2, 10, 16) for state in states)
    assert_close(model.get_output_embeddings()(states[-1][:, -1:]), output.logits, 1e-12)
    assert len({state.sum().item() for state in states}) == len(states)
    if kind in ("latent", "shared"):  # rotary positions: nothing is added to the embeddings
        assert torch.equal(states[0], model.get_input_embeddings()(ids()))
    assert model(ids()).hidden_states is None and not model.get_input_embeddings()._forward_hooks


# ---------------------------------------------------------------------- gradient checkpointing


def gradients_and_bytes(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of a loss, and how much its graph has kept."""
    model.zero_grad()
    torch.manual_seed(0)  # noise of the gate
    with kept_for_backward(model) as kept:
        loss = model(ids(20, 8), labels=ids(20, 8), use_cache=False).loss
    loss.backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }, sum(kept.values())


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_gradient_checkpointing(kind):
    model = model_of(kind).train()
    expected, most = gradients_and_bytes(model)
    for _ in range(2):  # the second time changes nothing
        model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    found, fewer = gradients_and_bytes(model)
    assert fewer < 0.8 * most
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name
    model.gradient_checkpointing_enable(every_n_layers=2)
    assert kind == "mixtral" or fewer < gradients_and_bytes(model)[1] < most
    model.gradient_checkpointing_disable()
    assert not any("forward" in vars(module) for module in model.modules())
    if kind != "mixtral":
        with pytest.raises(ValueError, match="use_reentrant"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="cache"):
            model(ids(), use_cache=True)


def test_gradient_checkpointing_keeps_the_hooks_of_accelerate():
    hooks = pytest.importorskip(
        "accelerate.hooks", reason="accelerate is not installed (extra `peers`)"
    )

    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, counting = model_of("gpt").train(), Counting()
    hooks.add_hook_to_module(model.model.blocks[0].moe.experts, counting)
    model.gradient_checkpointing_enable()
    model(ids(), labels=ids()).loss.backward()
    assert counting.calls == 2  # the second one in backward
    model.gradient_checkpointing_disable()
    model(ids(), labels=ids()).loss.backward()
    assert counting.calls == 3


def test_transformers_trainer_with_gradient_checkpointing(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra `peers`)")
    rows = [{"input_ids": row, "labels": row} for row in ids(rows=4)]
    how = {
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    losses = []
    for recompute in (False, True):
        arguments = transformers.TrainingArguments(
            tmp_path, gradient_checkpointing=recompute, **how
        )
        losses.append(
            transformers.Trainer(model_of("gpt"), arguments, train_dataset=rows)
            .train()
            .training_loss
        )
    assert losses[0] == losses[1] > 0


# -------------------------------------------------- accelerate, PEFT, quantisation


@pytest.mark.parametrize(
    "kind", ["shared", *(pytest.param(kind, marks=pytest.mark.faults) for kind in OTHERS)]
)
def test_weights_kept_on_the_cpu_or_on_disk(kind, tmp_path):
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed (extra `peers`)"
    )
    expected, cached = logits(model_of(kind)), through_cache(model_of(kind))
    on_cpu = accelerate.cpu_offload(model_of(kind), torch.device("cpu"))
    on_disk = accelerate.disk_offload(model_of(kind), tmp_path / "disk", torch.device("cpu"))
    model_of(kind).save_pretrained(tmp_path / "saved")
    memory = {"cpu": sum(p.nbytes for p in on_disk.parameters()) // 2}
    where = {"device_map": "auto", "max_memory": memory, "offload_folder": tmp_path / "map"}
    by_map = read(tmp_path / "saved", kind, **where)
    assert "disk" in by_map.hf_device_map.values()
    for model in (on_cpu, on_disk, by_map):
        assert any(p.is_meta for p in model.parameters())
        assert torch.equal(logits(model), expected)
        assert_close(through_cache(model), cached, 1e-12)


def with_adapters(kind: str, modules: list[str] | str) -> Any:
    """Return a model with LoRA whose weights are random, in float64."""
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules, r=2)
    model = (
        peft.get_peft_model(model_of(kind), config, autocast_adapter_dtype=False).double().eval()
    )
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4
    return model


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("latent", ["kv_up"]),
        ("farskip", "all-linear"),
        pytest.param("latent", ["gate"], marks=pytest.mark.faults),
        pytest.param("latent", "all-linear", marks=pytest.mark.faults),
        pytest.param("farskip", ["gate"], marks=pytest.mark.faults),
        pytest.param("farskip", ["kv_up"], marks=pytest.mark.faults),
    ],
)
def test_adapters_of_peft(kind, modules):
    plain, model = logits(model_of(kind)), with_adapters(kind, modules)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 0.1
    assert_close(through_cache(model), adapted, 1e-10)
    model.train()
    model(ids(), labels=ids()).loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad.any(), name
    model.eval()
    merged = model.merge_and_unload()
    assert_close(logits(merged), adapted, 1e-10)
    assert_close(through_cache(merged), adapted, 1e-10)


def test_adapters_with_new_tokens(tmp_path):
    """Chat tokens: the embeddings and the head are trained and saved beside the adapters."""
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")
    base = model_of("latent")
    base.resize_token_embeddings(VOCABULARY + 2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["qkv", "kv_up"], modules_to_save=["tokens", "head"]
    )
    model = peft.get_peft_model(base, config)
    inputs = torch.full((1, 4), VOCABULARY + 1)
    model(inputs, labels=inputs).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("tokens", "head"):
        assert any(f"{part}.modules_to_save" in name for name in trained)


def test_prefix_tuning_hands_over_a_cache():
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model_of("gpt").float(), config)
    model(ids(), labels=ids()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["latent", "gpt"])
def test_dynamic_quantisation(kind):
    model = model_of(kind).float()
    exact = logits(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    rounded = logits(quantised)
    assert 0 < (rounded - exact).abs().mean() < 0.2 * exact.abs().mean()
    assert (through_cache(quantised) - rounded).abs().mean() < 0.2 * exact.abs().mean()
