"""Our dense models equal transformers' GPT-2 and LLaMA, which are read from the folders that transformers writes.

Logits and all gradients are equal to 1e-5 of the largest entry in float32. Logits of upcycled MoE models are equal too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.init_from.pretrained import read_hf
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.model import build_model_to_train
from tests.support.models import assert_close, gradients, randomise

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
pytestmark = pytest.mark.peers

LAYERS, DIM, HEADS, FFN, VOCABULARY, LENGTH = 4, 16, 4, 24, 50, 12
OURS = (
    *(f"model.layers={LAYERS}", f"model.dim={DIM}", f"model.heads={HEADS}", f"model.ffn_dim={FFN}"),
    *("data.name=synthetic", f"data.vocab_size={VOCABULARY}", f"data.seq_len={LENGTH}", "moe.capacity_factor=null"),
)
FAMILY = {
    "gpt2": ("model.family=gpt", "model.activation=gelu_tanh"),
    "llama": ("model.family=llama", "model.kv_heads=2"),
}
TOLERANCE = 1e-5


def their_model(family: str, **changes) -> nn.Module:
    if family == "gpt2":
        sizes = {"n_layer": LAYERS, "n_embd": DIM, "n_head": HEADS, "n_inner": FFN, "n_positions": LENGTH}
        config = transformers.GPT2Config(vocab_size=VOCABULARY, **(sizes | changes))
        return randomise(transformers.GPT2LMHeadModel(config)).eval()
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": FFN, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **(sizes | changes))
    return randomise(transformers.LlamaForCausalLM(config)).eval()


def their_gradients(theirs: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Returns every parameter's gradient under our names: gradients are saved and read as if they were weights."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    theirs.save_pretrained(folder)
    checkpoint = read_hf(folder)
    return {name: checkpoint.read(name, None) for name in checkpoint.weights}


def config_of(family: str, folder: Path, *overrides: str) -> Config:
    return load(None, [*OURS, *FAMILY[family], f"init_from=hf:{folder}", "moe.architecture=dense", *overrides])


def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {}), ("llama", {}), ("llama", {"tie_word_embeddings": True})],
    ids=("gpt2", "llama", "llama-tied"),
)
def test_logits_and_gradients(family, changes, tmp_path):
    theirs = their_model(family, **changes)
    theirs.save_pretrained(tmp_path)
    ours = build_model_to_train(config_of(family, tmp_path), ParallelContext())
    logits, their_logits = ours(ids()).logits_BSV, theirs(ids()).logits
    assert_close(logits, their_logits, TOLERANCE)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    (their_logits * weights).sum().backward()
    grads, expected = gradients(ours), their_gradients(theirs, tmp_path / "gradients")
    assert grads.keys() == expected.keys()
    if changes:  # theirs are tied; ours are two weights with a gradient each
        grads["tokens.weight"] = grads["head.weight"] = grads["tokens.weight"] + grads["head.weight"]
    for name, grad in expected.items():
        assert grad.abs().max() > 1e-3, name
        assert_close(grads[name], grad, TOLERANCE, name)


def test_a_bare_model_in_several_files_with_fewer_positions_is_read(tmp_path):
    """The first GPT-2 files have names without a prefix; a model may use only the first positions."""
    theirs = their_model("gpt2")
    theirs.transformer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = build_model_to_train(config_of("gpt2", tmp_path, "data.seq_len=8"), ParallelContext())
    assert_close(ours(ids()[:, :8]).logits_BSV, theirs(ids()[:, :8]).logits, TOLERANCE)
