"""The shortcut models of others, and latent attention, equal transformers' parts wired by the
published equations.

NVIDIA Megatron-LM     Pos-1 with an MoE in every block, and a norm of the sum of shared and routed
                       output
NousResearch           Pos-2 with an MoE in every block: the tap is the preceding block's, the first
                       block's its own
AMD FarSkip            attention reads the stream without the preceding routed output
DeepSeek-V3, LongCat   multi-head latent attention, without and with scaled latents; Instella's with
                       a gate

None of the first three has a class in transformers. Theirs are attention, experts, MLP and norms;
the wiring is written here. All epsilons differ from ours, so that a mix-up shows. The tolerance is
that of tests/support/peers.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from scmoe.blocks.farskip import FarSkipBlock
from scmoe.blocks.latent import LatentAttention, LatentSizes
from scmoe.blocks.rotary import Rotary
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.models.residual_stream import run_blocks
from scmoe.moe.coefficient import DirectAdd
from scmoe.schedule.schedule import Schedule
from tests.support.peers import (
    DIM,
    EXPERTS,
    FFN,
    Called,
    Take,
    check_equal,
    stacked,
    stream,
    swiglu_mlp,
    under,
)

pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
pytestmark = pytest.mark.peers

HEADS, SEQ, EPS = 2, 10, 1e-2
norm = partial(nn.RMSNorm, DIM, EPS)
mlp = partial(MLP, DIM, FFN, bias=False, activation="swiglu")


def angles_of(rotary: nn.Module) -> tuple[Tensor, Tensor]:
    return rotary(torch.zeros(1, SEQ, DIM), torch.arange(SEQ)[None])


class Parts(nn.Module):
    """What a block of theirs has: LLaMA's attention and MLP, Mixtral's experts, norms."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.models.llama import modeling_llama as llama
        from transformers.models.mixtral import modeling_mixtral as mixtral

        sizes = {"hidden_size": DIM, "intermediate_size": FFN}
        config = llama.LlamaConfig(**sizes, num_attention_heads=HEADS, attn_implementation="sdpa")
        self.attention = Called(
            llama.LlamaAttention(config, 0), angles_of(llama.LlamaRotaryEmbedding(config))
        )
        experts = {"num_experts_per_tok": 2, "num_local_experts": EXPERTS}
        self.moe = mixtral.MixtralSparseMoeBlock(mixtral.MixtralConfig(**sizes, **experts))
        self.shared = llama.LlamaMLP(config)
        self.norm, self.moe_norm, self.tap_norm, self.after_norm = norm(), norm(), norm(), norm()

    def weights(self, take: Take, *norms: str) -> dict[str, Tensor]:
        """Return all parts under our names. norms: tap_norm, after.norm or both, as ours has."""
        theirs = self.attention.attention
        qkv = torch.cat([take(p.weight) for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj)])
        further = {"tap_norm": self.tap_norm, "after.norm": self.after_norm}
        return {
            "sublayers.0.norm.weight": take(self.norm.weight),
            "sublayers.0.f.qkv.weight": qkv,
            "sublayers.0.f.out.weight": take(theirs.o_proj.weight),
            "norm.weight": take(self.moe_norm.weight),
            **{f"{name}.weight": take(further[name].weight) for name in norms},
            **under("shared_expert", swiglu_mlp(self.shared, take)),
            "moe.router.gate.weight": take(self.moe.gate.weight),
            **under("moe", stacked(self.moe.experts, take)),
        }


class Wired(nn.Module):
    """Blocks of theirs. wiring: computes the output of all."""

    def __init__(self, blocks: int, wiring: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.wiring = nn.ModuleList(Parts() for _ in range(blocks)), wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self.blocks, x)


def sublayer() -> Residual:
    return Residual(norm(), Attention(DIM, HEADS, bias=False, rotary=Rotary()))


def shortcut(position: str, slot: int, after: nn.Module | None = None) -> ShortcutBlock:
    parts = {"tap_norm": norm(), "shared_expert": mlp(), "coefficient": DirectAdd(DIM)}
    return ShortcutBlock(
        [sublayer()], norm(), stream(2), Schedule("scmoe", position, slot, 2), after, **parts
    )


def check_blocks(
    ours: list[nn.Module], wiring: Callable[[nn.ModuleList, Tensor], Tensor], *norms: str
) -> None:
    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        each = (under(str(i), block.weights(take, *norms)) for i, block in enumerate(theirs.blocks))
        return {name: weight for block in each for name, weight in block.items()}

    theirs = Wired(len(ours), wiring)
    check_equal(
        nn.ModuleList(ours), theirs, weights, lambda x: run_blocks(ours, x, None)[0], theirs
    )


@pytest.mark.parametrize("slot", (0, 1, 2))
def test_nvidia(slot):
    def wiring(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for b in blocks:
            m = x + b.attention(b.norm(x))
            x = m + b.after_norm(b.moe(b.tap_norm(x)) + b.shared(b.moe_norm(m)))
        return x

    ours = [shortcut("pos1", slot, nn.Sequential(OrderedDict(norm=norm()))) for _ in range(2)]
    check_blocks(ours, wiring, "tap_norm", "after.norm")


@pytest.mark.parametrize("slot", (0, 1, 2))
def test_nous(slot):
    def wiring(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        tap = None
        for b in blocks:
            m = x + b.attention(b.norm(x))
            x = m + b.shared(b.moe_norm(m)) + b.moe(b.tap_norm(m if tap is None else tap))
            tap = m
        return x

    ours = [shortcut("first", min(slot, 1)), shortcut("carried", slot), shortcut("carried", slot)]
    check_blocks(ours, wiring, "tap_norm")


@pytest.mark.parametrize("slot", (0, 1, 2))
def test_farskip(slot):
    def wiring(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        without_routed = x
        for b in blocks:
            attended, u = b.attention(b.norm(without_routed)), b.moe_norm(x)
            without_routed = x + attended + b.shared(u)
            x = without_routed + b.moe(u)
        return x

    schedule = Schedule("farskip", None, slot, 2)
    ours: list[nn.Module] = [
        FarSkipBlock([sublayer()], norm(), stream(2), schedule, shared_expert=mlp())
        for _ in range(3)
    ]
    check_blocks(ours, wiring)


SIZES = {
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
NAMES = {
    "q_a_proj": "q_down",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_up",
    "q_proj": "q_up",
    "o_proj": "out",
}
NAMES |= {
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up",
    "gate_proj": "gate",
}


class Gated(nn.Module):
    """Their attention with Instella's gate before the output product."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.gate_proj = (
            attention,
            nn.Linear(DIM, attention.o_proj.in_features, bias=False),
        )

    def forward(self, hidden_states: Tensor, **others: object) -> tuple[Tensor, ...]:
        gate = self.gate_proj(hidden_states).sigmoid()
        handle = self.attention.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * gate,))
        output = self.attention(hidden_states=hidden_states, **others)
        handle.remove()
        return output


@pytest.mark.parametrize(
    "peer", ("deepseek_v3", "deepseek_v3, no query latent", "deepseek_v3, gated", "longcat_flash")
)
def test_latent_attention(peer):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.longcat_flash import modeling_longcat_flash as longcat
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig

    sizes = SIZES | ({} if peer in ("deepseek_v3", "longcat_flash") else {"q_lora_rank": None})
    given = {
        "hidden_size": DIM,
        "num_attention_heads": HEADS,
        "head_dim": 4,
        "rms_norm_eps": EPS,
        **sizes,
    }
    if peer == "longcat_flash":
        config = LongcatFlashConfig(**given, rope_theta=10000.0, attn_implementation="sdpa")
        config.rope_parameters["rope_theta"] = 10000.0
        attention, rotary = (
            longcat.LongcatFlashMLA(config, 0),
            longcat.LongcatFlashRotaryEmbedding(config),
        )
    else:
        config = DeepseekV3Config(**given, num_key_value_heads=HEADS, attn_implementation="sdpa")
        attention, rotary = (
            deepseek.DeepseekV3Attention(config, 0),
            deepseek.DeepseekV3RotaryEmbedding(config),
        )
    gated = peer.endswith("gated")
    theirs = Called(Gated(attention) if gated else attention, angles_of(rotary))
    ours = LatentAttention(
        DIM, HEADS, LatentSizes(*sizes.values()), Rotary(), peer == "longcat_flash", gated
    )

    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        named = ((name.split(".")[-2:], p) for name, p in theirs.named_parameters())
        return {f"{NAMES[part]}.{kind}": take(p) for (part, kind), p in named}

    check_equal(ours, theirs, weights, ours, theirs)
