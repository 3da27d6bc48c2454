"""What language models share: output, weight initialisation, generation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scmoe.blocks.sublayers import MLP, Attention
from scmoe.moe.experts import Experts, named_generator
from scmoe.tokens import RouterStats


class LMOutput(NamedTuple):
    logits_BSV: Tensor
    stats: list[RouterStats]  # one per MoE layer


def check_length(ids_BS: Tensor, max_seq_len: int) -> None:
    if ids_BS.shape[1] > max_seq_len:
        raise ValueError(f"a sequence has {ids_BS.shape[1]} tokens, allowed: up to data.seq_len, {max_seq_len}")


def run_blocks(blocks: Iterable[nn.Module], x_BSD: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, list[RouterStats]]:
    """One block after the other, and the router's sums of those that have one."""
    stats = []
    for block in blocks:
        x_BSD, layer_stats = block(x_BSD, mask_BS)
        if layer_stats is not None:
            stats.append(layer_stats)
    return x_BSD, stats


@torch.no_grad()
def init_gpt_weights(model: Any, seed: int) -> None:
    """GPT-2's: N(0, 0.02), products that write to the residual stream / sqrt(2 layers); experts: Experts.init_weights.

    A weight depends on the seed, its name and its shape alone: not on the rank, the EP degree or earlier draws, nor on
    what else the model has. So architectures that share a part begin with it alike, as a comparison wants.
    """
    num_layers = sum(isinstance(module, Attention) for module in model.modules())
    std, std_out = 0.02, 0.02 / math.sqrt(2 * num_layers)
    tied = model.head.weight is model.tokens.weight
    write_to_residual = {m.out for m in model.modules() if isinstance(m, Attention)}
    write_to_residual |= {m.w_out for m in model.modules() if isinstance(m, MLP)}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.init_weights(f"{seed}/{name}", std, std_out)
        elif isinstance(module, (nn.Linear, nn.Embedding)) and (module is not model.head or not tied):
            fresh = torch.randn(module.weight.shape, generator=named_generator(f"{seed}/{name}"))
            module.weight.copy_(fresh * (std_out if module in write_to_residual else std))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


@torch.no_grad()
def generate(
    model: Any, ids_BS: Tensor, num_tokens: int, *, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Tensor:
    """Appends num_tokens sampled tokens to each row; the model sees the last max_seq_len. temperature 0: the likeliest.

    Under expert parallelism every rank must call it alike, as every forward pass does.
    """
    generator = torch.Generator(ids_BS.device).manual_seed(seed)
    for _ in range(num_tokens):
        logits_BV = model(ids_BS[:, -model.max_seq_len :]).logits_BSV[:, -1].float()
        if temperature == 0:
            next_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            kept_BK, ids_BK = logits_BV.topk(min(top_k, logits_BV.shape[-1]))
            choice_B1 = (kept_BK / temperature).softmax(-1).multinomial(1, generator=generator)
            next_B1 = ids_BK.gather(-1, choice_B1)
        ids_BS = torch.cat([ids_BS, next_B1], dim=1)
    return ids_BS
