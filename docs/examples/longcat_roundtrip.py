"""A LongCat-Flash of transformers becomes a ScMoE, is trained for two steps, and goes back (extra
`hf`, no network).

.venv/bin/python docs/examples/longcat_roundtrip.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LongcatFlashConfig, LongcatFlashForCausalLM

import scmoe
from scmoe.cli.export import main as export
from scmoe.training.run.train import train

SIZES: dict[str, Any] = {
    **{
        "vocab_size": 512,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
    },
    **{
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    **{
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 3,
        "expert_ffn_hidden_size": 32,
        "head_dim": 8,
    },
}
PRESET = (  # the wiring; the folder's sizes replace the preset's
    "configs/model/longcat_flash_tiny.yaml"
)
WORDS = [
    *(
        "model.layers=4",
        "model.dim=64",
        "model.heads=4",
        "model.ffn_dim=128",
    ),  # a layer of theirs is a pair of ours
    *(
        "model.latent.q_rank=32",
        "model.latent.kv_rank=16",
        "model.latent.nope_dim=16",
        "model.latent.rope_dim=8",
    ),
    *(
        "model.latent.value_dim=16",
        "moe.num_experts=8",
        "moe.zero_experts=4",
        "moe.top_k=3",
        "moe.ffn_dim=32",
    ),
    *(
        "data.name=synthetic",
        "data.global_batch_size=8",
        "trainer.accelerator=cpu",
        "trainer.max_steps=2",
    ),
    *("optim.warmup_steps=0", "logger.mode=disabled", "trainer.progress=false"),
]


def main() -> None:
    torch.manual_seed(1)
    ids = torch.randint(512, (2, 64))
    with tempfile.TemporaryDirectory() as place:
        first, last = Path(place) / "first", Path(place) / "last"
        theirs = LongcatFlashForCausalLM(LongcatFlashConfig(**SIZES)).eval()
        theirs.save_pretrained(first)
        compare("read", scmoe.load(first), theirs, ids)

        config = scmoe.load_config(
            PRESET, [*WORDS, f"init_from=hf:{first}", f"runs_dir={place}/runs"]
        )
        summary = train(config)
        assert summary is not None
        export(Path(summary["run_dir"]), format="hf", out=last)
        again = AutoModelForCausalLM.from_pretrained(last).eval()
        compare(f"trained for {summary['steps']} steps and written", scmoe.load(last), again, ids)
        moved = (
            (again.model.embed_tokens.weight - theirs.model.embed_tokens.weight).abs().max().item()
        )
        print(f"largest change of an embedding: {moved:.1e}")


@torch.inference_mode()
def compare(what: str, ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    """Print the largest difference of logits over the largest logit. AssertionError: it is above
    1e-5."""
    logits, their_logits = ours(ids).logits_BSV, theirs(ids).logits
    error = ((logits - their_logits).abs().max() / their_logits.abs().max()).item()
    print(f"{what}: logits of {type(theirs).__name__} and of scmoe differ by {error:.1e}")
    assert error < 1e-5


if __name__ == "__main__":
    main()
