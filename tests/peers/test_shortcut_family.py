"""The shortcut models of others equal transformers' parts wired by the published equations.

NVIDIA Megatron-LM     Pos-1 with an MoE in every block, and a norm of the sum of shared and routed output
NousResearch           Pos-2 with an MoE in every block: the tap is the preceding block's, the first block's its own
AMD FarSkip            attention reads the stream without the preceding routed output

None of them has a class in transformers. Theirs are attention, experts, MLP and norms; the wiring is written here. All
epsilons differ from ours, so that a mix-up shows. Latent attention is compared in the models of test_family_folders.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from scmoe.blocks.farskip import FarSkipBlock
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual, Rotary
from scmoe.models.units import through
from scmoe.moe.coefficient import DirectAdd
from scmoe.schedule.schedule import Schedule
from tests.support.peers import DIM, EXPERTS, FFN, Take, check_equal, stacked, stream, swiglu_mlp, under

pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
pytestmark = pytest.mark.peers

HEADS, SEQ, EPS = 2, 10, 1e-2
norm = partial(nn.RMSNorm, DIM, EPS)
mlp = partial(MLP, DIM, FFN, bias=False, activation="swiglu")


class Parts(nn.Module):
    """What a block of theirs has: LLaMA's attention and MLP, Mixtral's experts, norms."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.models.llama import modeling_llama as llama
        from transformers.models.mixtral import modeling_mixtral as mixtral

        sizes = {"hidden_size": DIM, "intermediate_size": FFN}
        config = llama.LlamaConfig(**sizes, num_attention_heads=HEADS, attn_implementation="sdpa")
        self.their_attention, rotary = llama.LlamaAttention(config, 0), llama.LlamaRotaryEmbedding(config)
        self.angles = rotary(torch.zeros(1, SEQ, DIM), torch.arange(SEQ)[None])
        experts = {"num_experts_per_tok": 2, "num_local_experts": EXPERTS}
        self.moe = mixtral.MixtralSparseMoeBlock(mixtral.MixtralConfig(**sizes, **experts))
        self.shared = llama.LlamaMLP(config)
        self.norm, self.moe_norm, self.tap_norm, self.after_norm = norm(), norm(), norm(), norm()

    def attention(self, x_BSD: Tensor) -> Tensor:
        return self.their_attention(hidden_states=x_BSD, position_embeddings=self.angles, attention_mask=None)[0]

    def weights(self, take: Take, *norms: str) -> dict[str, Tensor]:
        """Returns all parts under our names. norms: those of tap_norm and after.norm that ours has."""
        theirs = self.their_attention
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
    return ShortcutBlock([sublayer()], norm(), stream(2), Schedule("scmoe", position, slot, 2), after, **parts)


def check_blocks(ours: list[nn.Module], wiring: Callable[[nn.ModuleList, Tensor], Tensor], *norms: str) -> None:
    def weights(theirs: nn.Module, take: Take) -> dict[str, Tensor]:
        each = (under(str(i), block.weights(take, *norms)) for i, block in enumerate(theirs.blocks))
        return {name: weight for block in each for name, weight in block.items()}

    theirs = Wired(len(ours), wiring)
    check_equal(nn.ModuleList(ours), theirs, weights, lambda x: through(ours, x, None)[0], theirs)


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
        FarSkipBlock([sublayer()], norm(), stream(2), schedule, shared_expert=mlp()) for _ in range(3)
    ]
    check_blocks(ours, wiring)
