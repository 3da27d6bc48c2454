"""The base model of type scmoe, several texts in a row, and what transformers and torch hand to or
ask of the classes beyond a plain forward pass. Mixtral is a control. float64, so that sums of
another order differ by 1e-12 only.
"""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import scmoe
from scmoe.datamodules.tokenizer import make_tokenizer
from tests.support.hf_models import KINDS, VOCABULARY, config_of, ids, logits, model_of
from tests.support.models import assert_close

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra `peers`)"
)
pytestmark = pytest.mark.peers

# positions of texts of 4, 1 and 5 tokens in a row
PACKED = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4]])


# ---------------------------------------------------------------------- the base model


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_the_head_of_the_base_models_states_gives_the_logits(kind):
    model = model_of(kind)
    output = model.base_model(input_ids=ids(), use_cache=False, output_router_logits=True)
    assert output.cache is None
    assert_close(model.get_output_embeddings()(output.last_hidden_state), logits(model), 1e-12)
    width = model.config.num_experts if kind != "mixtral" else model.config.num_local_experts
    assert {tuple(routing.shape) for routing in output.router_logits} == {(20, width)}
    assert model.base_model(ids(), return_dict=False)[0].shape == (2, 10, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_as_base_model_and_a_base_model_as_causal_model(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path / "whole")
    how = {"dtype": torch.float64, "output_loading_info": True}
    base, report = transformers.AutoModel.from_pretrained(tmp_path / "whole", **how)
    assert not any(report.values()), report
    states = base(ids()).last_hidden_state
    assert torch.equal(states, model.base_model(ids()).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **how)
    assert not any(report.values()), report
    assert torch.equal(logits(again), logits(model))


def test_names_of_weights_in_a_folder_are_those_of_a_checkpoint(tmp_path):
    from safetensors.torch import load_file

    model_of("gpt").save_pretrained(tmp_path)
    of_network = scmoe.load(tmp_path).named_parameters()
    assert {*load_file(tmp_path / "model.safetensors")} == {
        f"model.{name}" for name, _ in of_network
    }


@pytest.mark.parametrize("words", ["moe.top_k=1", "moe.top_k=2"])
def test_transformers_load_balance_loss_of_our_router_logits(words):
    """theirs counts all copies of a token, ours shares them out, so theirs is top_k times ours."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = model_of(f"moe.architecture=scmoe model.layers=2 {words}")
    config, mask = model.config, torch.ones_like(ids())
    mask[0, :3] = 0
    ours = model(ids(), mask, output_router_logits=True)
    assert len(ours.router_logits) == 1  # theirs is one over all layers
    per_token = config.num_experts_per_tok
    theirs = load_balancing_loss_func(ours.router_logits, config.num_experts, per_token, mask)
    assert theirs.item() == pytest.approx(per_token * ours.aux_loss.item(), rel=1e-6)
    model.train()(ids(), mask, output_router_logits=True).router_logits[0].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_dense_model_has_no_experts_and_no_weight_of_their_loss():
    model = model_of("moe.architecture=dense")
    assert model.config.router_aux_loss_coef == 0 and "num_experts" not in vars(model.config)
    output = model(ids(), labels=ids(), output_router_logits=True)
    assert output.aux_loss is None and output.router_logits is None


# ---------------------------------------------------------------------- several texts in a row


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_texts_in_a_row_are_as_alone(kind):
    model, row = model_of(kind), ids(rows=1)
    together = logits(model, input_ids=row, position_ids=PACKED, use_cache=False)
    for first, last in ((0, 4), (4, 5), (5, 10)):
        assert_close(together[:, first:last], logits(model, input_ids=row[:, first:last]), 1e-10)
    plain = logits(model, input_ids=row)
    assert (together - plain).abs().max() > 0.01
    from_zero = torch.arange(10)[None]
    assert torch.equal(logits(model, input_ids=row, position_ids=from_zero), plain)


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_given_positions_are_those_of_a_longer_text(kind):
    """Positions after an offset are those of tokens in a cache, and a mask says what they see."""
    model = model_of(kind)
    first = model(ids()[:, :4], use_cache=True)
    later = {"cache": first.cache, "position_ids": torch.arange(4, 10)[None]}
    assert_close(logits(model, input_ids=ids()[:, 4:], **later), logits(model)[:, 4:], 1e-10)
    mask = torch.ones_like(ids())
    mask[:, :3] = 0
    shifted = (mask.cumsum(1) - 1).clamp(min=0)
    padded = logits(model, attention_mask=mask, position_ids=shifted)[:, 3:]
    assert_close(padded, logits(model, input_ids=ids()[:, 3:]), 1e-10)


def test_texts_in_a_row_have_no_cache():
    model, row = model_of("gpt"), ids(rows=1)
    assert model(row, position_ids=PACKED).cache is None
    with pytest.raises(ValueError, match="several texts"):
        model(row, position_ids=PACKED, use_cache=True)
    with pytest.raises(ValueError, match="position_ids"):
        model(row, position_ids=PACKED[:, 1:])
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(row, cu_seq_lens_q=torch.tensor([0, 4, 5, 10]))


# ---------------------------------------------------------------------- what callers ask


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_a_second_post_init_draws_nothing(kind):
    model = model_of(kind)
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    for trained in (model, copy.deepcopy(model)):
        before = {name: p.clone() for name, p in trained.named_parameters()}
        trained.post_init()
        for name, p in trained.named_parameters():
            assert torch.equal(p, before[name]), name


def test_a_subclass_draws_what_it_adds():
    from scmoe.hf import ScMoEForCausalLM

    class WithValue(ScMoEForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.value = nn.Linear(16, 1)
            nn.init.constant_(self.value.weight, 7.0)
            self.post_init()

    model = WithValue(config_of(KINDS["gpt"]))
    assert 0 < model.value.weight.abs().max() < 1
    assert model.model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_logits_to_keep_as_a_tensor(kind):
    model, whole = model_of(kind), logits(model_of(kind))
    places = torch.tensor([2, 7])
    assert_close(logits(model, logits_to_keep=places), whole[:, places], 1e-12)
    assert_close(logits(model, logits_to_keep=3), whole[:, -3:], 1e-12)
    mask = ids() % 2 == 0
    assert_close(logits(model, logits_to_keep=mask), whole[mask], 1e-12)


DENSE = ("moe.architecture=dense", "moe.architecture=dense model.family=llama model.kv_heads=2")


# Experts have as many rows as the router gives them, which neither form of a graph can hold.
@pytest.mark.parametrize("words", DENSE)
def test_export_without_a_mask(words):
    model = model_of(words)
    program = torch.export.export(model, (ids(),), {"use_cache": False}, strict=False)
    assert_close(program.module()(ids(), use_cache=False).logits, logits(model), 1e-12)


@pytest.mark.parametrize("words", DENSE)
def test_a_trace_of_the_model(words):
    model = model_of(words)
    model.config.use_cache, model.config.return_dict = False, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; Python values are constants
        traced = torch.jit.trace(model, (ids(),), check_trace=False)
    assert_close(traced(ids())[0], logits(model, return_dict=True), 1e-12)


def a_tokenizer(tmp_path):
    make_tokenizer("bpe", VOCABULARY, ["A text. And more. "]).save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["gpt", "mixtral"])
def test_generation_stops_at_a_text(kind, tmp_path):
    tokenizer, model = a_tokenizer(tmp_path), model_of(kind)
    how = {"attention_mask": torch.ones(1, 4), "do_sample": False, "max_new_tokens": 8}
    whole = model.generate(ids(4, 1), **how)[0, 4:]
    text = tokenizer.decode(whole[2:3]) or tokenizer.decode(whole[:3])
    stopped = model.generate(ids(4, 1), stop_strings=[text], tokenizer=tokenizer, **how)
    assert torch.equal(stopped[0, 4:], whole[: len(stopped[0]) - 4]) and len(stopped[0]) < 12


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused(call):
    with pytest.raises(ValueError, match="padded on the left"):
        getattr(model_of("gpt"), call)([[1, 2, 3]])
