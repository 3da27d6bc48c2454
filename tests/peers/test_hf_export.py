"""A folder of `make export FORMAT=hf` is read by transformers with equal logits, and by us with bit-identical weights.

float32: sums of another order differ by 1e-6 of the largest logit; the bound is 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import scmoe
from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.datamodules.tokenizer import make_tokenizer
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.saving import write_whole
from scmoe.runs.hf_config import hf_config
from scmoe.runs.hf_folder import write_folder
from tests.support.models import assert_close, tiny_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
pytestmark = pytest.mark.peers

LLAMA = "model.family=llama model.kv_heads=2"
KINDS = {  # words: model_type
    "moe.architecture=dense model.activation=gelu_tanh": "gpt2",
    "moe.architecture=dense": "gpt2",
    f"{LLAMA} moe.architecture=dense moe.noisy=true": "llama",  # without a gate it has no noise
    f"{LLAMA} moe.architecture=top_k moe.top_k=2 moe.every=1": "mixtral",
    f"{LLAMA} moe.architecture=shared_expert": "qwen2_moe",
    f"{LLAMA} moe.architecture=shared_expert moe.top_k=2 moe.every=1": "qwen2_moe",
    f"{LLAMA} moe.architecture=shared_expert moe.top_k=2 moe.renormalise=false": "qwen2_moe",
    f"{LLAMA} moe.architecture=shared_expert moe.combine=cg2": "scmoe",
    f"{LLAMA} moe.architecture=top_k moe.top_k=2": "scmoe",  # Mixtral has an MoE in every block
    f"{LLAMA} moe.architecture=top_k moe.top_k=1 moe.every=1": "scmoe",  # there its weight is 1
    f"{LLAMA} moe.architecture=shared_expert moe.noisy=true": "scmoe",  # weights of the noise have no place there
    "moe.architecture=dense model.activation=swiglu": "scmoe",
    "moe.architecture=scmoe moe.capacity_factor=0.5": "scmoe",
    f"{LLAMA} moe.architecture=scmoe moe.position=pos3 moe.combine=cg2 moe.coefficient_input=tap": "scmoe",
    "moe.architecture=dgmoe_share model.layers=4": "scmoe",
}
LENGTH = 12
TEXT = "My fellow citizens, the state of the union: naïve 🙂 \n\n  two  spaces."


def config_of(words: str) -> Config:
    sizes = ("model.layers=4", "model.dim=16", "model.heads=4", "model.ffn_dim=24", "moe.num_experts=6")
    data = ("data.name=synthetic", "data.vocab_size=300", f"data.seq_len={LENGTH}", "moe.capacity_factor=null")
    return load(None, [*sizes, *data, *words.split()])


def checkpoint_of(config: Config, folder: Path) -> torch.nn.Module:
    """Writes a checkpoint with only a network's weights, and returns the network."""
    model = tiny_model(config, torch.float32).eval()
    partial = durable.partial_path(folder, "0" * 8)
    partial.mkdir()
    weights = {f"model.model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    write_whole(weights, partial / "all.safetensors")
    durable.commit(partial, folder, 3, {"all.safetensors": durable.fingerprint(partial / "all.safetensors")})
    return model


def ids() -> torch.Tensor:
    return torch.randint(300, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def exported(words: str, folder: Path, **how: Any) -> tuple[torch.nn.Module, str]:
    config = config_of(words)
    model = checkpoint_of(config, folder / "step=3.ckpt")
    return model, write_folder(folder / "step=3.ckpt", folder / "hf", config, **how)


def theirs(folder: Path) -> Any:
    import scmoe.hf  # noqa: F401

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("words", KINDS)
def test_logits_and_weights(words, tmp_path):
    model, kind = exported(words, tmp_path)
    assert kind == KINDS[words]
    ours, loaded = scmoe.load(tmp_path / "hf"), theirs(tmp_path / "hf")
    assert type(loaded).__module__.startswith("scmoe." if kind == "scmoe" else "transformers.")
    for name, p in model.named_parameters():
        assert torch.equal(p, ours.get_parameter(name)), name
    assert not ours.training
    with torch.inference_mode():
        assert_close(loaded(ids()).logits, ours(ids()).logits_BSV, 1e-5)
        if "capacity" not in words:  # a folder's model drops nothing
            assert_close(ours(ids()).logits_BSV, model(ids()).logits_BSV, 1e-5)


def test_a_gate_that_transformers_does_not_have_is_scmoes_own():
    words = f"{LLAMA} moe.architecture=top_k moe.top_k=2 moe.every=1 moe.balanced_routing=true"
    assert hf_config(config_of(words), None)["model_type"] == "scmoe"


def test_a_large_model_is_written_in_several_files(tmp_path):
    words = f"{LLAMA} moe.architecture=shared_expert"
    model, _ = exported(words, tmp_path, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("model*"))
    assert len(files) > 3 and files[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / "hf" / files[-1]).read_text())
    assert set(index["weight_map"].values()) == set(files[:-1])
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    with torch.inference_mode():
        assert_close(theirs(tmp_path / "hf")(ids()).logits, scmoe.load(tmp_path / "hf")(ids()).logits_BSV, 1e-5)
    write_folder(tmp_path / "step=3.ckpt", tmp_path / "hf", config_of(words))
    assert [path.name for path in (tmp_path / "hf").glob("model*")] == ["model.safetensors"], "old files are gone"


@pytest.mark.parametrize("words", ["moe.architecture=dense", "moe.architecture=scmoe"])
def test_the_tokenizer_gives_the_same_ids(words, tmp_path):
    tokenizer = make_tokenizer("bpe", 300, [TEXT * 3])
    exported(words, tmp_path, tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded(TEXT)["input_ids"] == tokenizer.encode(TEXT).tolist()
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    assert loaded.eos_token_id == tokenizer.end_of_text == theirs(tmp_path / "hf").config.eos_token_id


def test_the_registered_class_generates_trains_and_refuses_padding_on_the_left(tmp_path):
    exported("moe.architecture=scmoe", tmp_path, tokenizer=make_tokenizer("bpe", 300, [TEXT]))
    model, start = theirs(tmp_path / "hf"), ids()[:, :4]
    given = {"input_ids": start, "attention_mask": torch.ones_like(start)}  # as a tokenizer returns them
    written = model.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = start
    with torch.inference_mode():
        for _ in range(5):
            expected = torch.cat([expected, model.model(expected).logits_BSV[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, expected)
    model(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, -3:] = 0
    assert torch.isfinite(model(ids(), attention_mask=mask).logits[0, :-3]).all()
    with pytest.raises(ValueError, match="padding before tokens"):
        model(ids(), attention_mask=mask.flip(1))
    model.save_pretrained(tmp_path / "again")
    again = scmoe.load(tmp_path / "again")
    for name, p in model.model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name


def test_init_from_reads_mixtral_and_qwen2_moe(tmp_path):
    """Weights of an exported folder start another training, under the names that transformers gives them."""
    from scmoe.parallel.mesh import ParallelContext
    from scmoe.training.assembly.model import build_model_to_train

    for i, words in enumerate(words for words, kind in KINDS.items() if kind in ("mixtral", "qwen2_moe")):
        (tmp_path / str(i)).mkdir()
        model, _ = exported(words, tmp_path / str(i))
        config = config_of(f"{words} init_from=hf:{tmp_path / str(i) / 'hf'}")
        started = build_model_to_train(config, ParallelContext())
        for name, p in model.named_parameters():
            assert torch.equal(p, started.get_parameter(name)), name
