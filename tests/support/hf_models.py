"""Small models of type scmoe in transformers' classes, Mixtral as a control, and what tests ask of
them. transformers is imported where it is used, so that a test can skip without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scmoe.config.load import load_config
from scmoe.weights.hf_config import scmoe_config
from tests.support.architectures import LATENT_ATTENTION, overrides
from tests.support.models import randomise

GPT = "moe.architecture=scmoe"
LLAMA = "model.family=llama model.kv_heads=2"
LATENT = " ".join(
    ["model.family=llama", *overrides(LATENT_ATTENTION["longcat"]), "moe.router=longcat"]
)
SHARED = f"{LLAMA} moe.architecture=dgmoe_share moe.noisy=true"
FARSKIP = " ".join(
    ["model.family=llama", *overrides(LATENT_ATTENTION["instella"]), "moe.router=deepseek"]
)
KINDS = {"gpt": GPT, "latent": LATENT, "shared": SHARED, "farskip": FARSKIP}
VOCABULARY, LENGTH = 300, 24
EAGER = "eager"


def read(folder: Path, kind: str, **how: Any) -> Any:
    """Return the model of a saved folder in float64."""
    import transformers

    how |= {"experts_implementation": EAGER} if kind == "mixtral" else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **how)


def config_of(words: str) -> Any:
    """Return transformers' config of a small model."""
    from scmoe.hf import ScMoEConfig

    sizes = (
        "model.layers=4",
        "model.dim=16",
        "model.heads=4",
        "model.ffn_dim=24",
        "moe.num_experts=6",
    )
    data = ("data.name=synthetic", f"data.vocab_size={VOCABULARY}", f"data.seq_len={LENGTH}")
    content = scmoe_config(
        load_config(None, [*sizes, *data, "moe.capacity_factor=null", *words.split()])
    )
    return ScMoEConfig(
        **{
            key: value
            for key, value in content.items()
            if key not in ("model_type", "architectures")
        }
    )


def model_of(kind: str) -> Any:
    """Return a model with random weights in float64, in evaluation mode.

    kind: one of KINDS, mixtral, or overrides of our configuration.
    """
    if kind == "mixtral":
        import transformers

        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
        }
        config = transformers.MixtralConfig(vocab_size=VOCABULARY, **sizes, **heads)
        config._experts_implementation = EAGER  # the default one has no float64
        model = transformers.MixtralForCausalLM(config)
    else:
        from scmoe.hf import ScMoEForCausalLM

        model = ScMoEForCausalLM(config_of(KINDS.get(kind, kind)))
    model = model.double().eval()
    randomise(model)
    return model


def ids(seq_len: int = 10, rows: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, seq_len), generator=torch.Generator().manual_seed(0))


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**({"input_ids": ids()} | inputs)).logits


def through_cache(model: Any) -> torch.Tensor:
    """Return the logits of `ids()` read in three passes with a cache."""
    with torch.no_grad():
        first = model(ids()[:, :4], use_cache=True)
        second = model(ids()[:, 4:9], cache=first.cache)
        third = model(ids()[:, 9:], cache=second.cache)
    return torch.cat([first.logits, second.logits, third.logits], 1)
