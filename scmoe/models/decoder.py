"""The language models: what they share, and GPT-2's and LLaMA-2's choice of parts."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.sublayers import MLP, SelfAttention
from scmoe.models.halves import Halves
from scmoe.models.residual_stream import run_blocks, widen_under_autocast
from scmoe.moe.experts import Experts, named_generator
from scmoe.moe.router import SelectionBias
from scmoe.moe.tokens import RouterStats


class LMOutput(NamedTuple):
    logits_BSV: Tensor
    stats: list[RouterStats]  # one per MoE layer


class Decoder(nn.Module):
    """Embedding, blocks, norm, output products. GPT and Llama choose the parts.

    blocks: each is called as block(x_BSD, mask_BS), with a KVCache where there is one, and returns
    an MoEOutput, or HandedOn with what the next block gets. positions: learned embeddings of the
    positions; None: the blocks know the positions (rotary).
    """

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int,
        dim: int,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        dropout: float,
        positions: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = positions
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.halves = Halves()
        self.norm = norm
        self.head = nn.Linear(dim, vocab_size, bias=False)

    @property
    def steps(self) -> list[nn.Module]:
        """What runs one after the other: the blocks."""
        return list(self.blocks)

    def forward(
        self,
        ids_BS: Tensor,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        last_B: Tensor | None = None,
    ) -> LMOutput:
        """Return the logits of each next token.

        ids_BS: token ids, or embeddings of the tokens, [B, S, D]. mask_BS False: padding, at the
        end of a sequence. cache: holds the tokens before these; call `cache.expect` for these
        first. last_B: index of the one token in a row whose logits are returned, as [B, 1, V].
        """
        x_BSD, all_stats = stream_after_blocks(self, ids_BS, mask_BS, cache)
        if last_B is not None:
            x_BSD = x_BSD.take_along_dim(last_B[:, None, None], 1)
        return LMOutput(self.head(self.norm(x_BSD)), all_stats)

    def init_weights(self, seed: int, put: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """Draw all weights as GPT-2's (`draw_weights`)."""
        draw_weights(self, seed, put)

    def rows_per_sample(self, seq_len: int) -> dict[nn.Module, float]:
        """Return the rows that each module sees of one sample: its tokens."""
        return dict.fromkeys(self.modules(), float(seq_len))


def stream_after_blocks(
    network: Any, ids_BS: Tensor, mask_BS: Tensor | None = None, cache: KVCache | None = None
) -> tuple[Tensor, list[RouterStats]]:
    """Return the residual stream after the last block, before the norm, and the routers' sums.

    network: has the parts and sizes of a Decoder under their names. Other arguments are those of
    its forward. Raises ValueError for a sequence that is too long.
    """
    seq_len = ids_BS.shape[1] if cache is None else cache.longest
    if seq_len > network.max_seq_len:
        raise ValueError(
            f"a sequence has {seq_len} tokens, allowed: up to data.seq_len, {network.max_seq_len}"
        )
    embedded_BSD = ids_BS if ids_BS.is_floating_point() else network.tokens(ids_BS)
    x_BSD = widen_under_autocast(embedded_BSD)
    if network.positions is not None:
        if cache is None:
            positions = torch.arange(seq_len, device=ids_BS.device)
        else:
            positions = cache.positions_BS
        x_BSD = x_BSD + network.positions(positions)
    through_blocks = partial(run_blocks, network.blocks)
    return network.halves(through_blocks, network.dropout(x_BSD), mask_BS, cache)


@torch.no_grad()
def draw_weights(
    network: Any, seed: int, put: Callable[[Tensor, Tensor], Any] = Tensor.copy_
) -> None:
    """Draw all weights as GPT-2's.

    They are N(0, 0.02), and N(0, 0.02 / sqrt(2 layers)) for products that write to the residual
    stream. A weight depends only on the seed, its name and its shape: not on the rank, the EP
    degree, earlier draws or the rest of the model. So architectures that share a part start with
    equal weights there, and can be compared. network: has the parts of a Decoder under their names.
    put: copies a value into a weight, or into the part of a weight that this rank holds.
    """
    attentions = [module for module in network.modules() if isinstance(module, SelfAttention)]
    std, std_out = 0.02, 0.02 / math.sqrt(2 * len(attentions))
    mlps = [module for module in network.modules() if isinstance(module, MLP)]
    write_to_residual = {*(m.out for m in attentions), *(m.w_out for m in mlps)}
    tied = network.head.weight is network.tokens.weight
    for name, module in network.named_modules():
        if isinstance(module, Experts):
            module.init_weights(f"{seed}/{name}", std, std_out, put)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, SelectionBias)):
            module.reset_parameters()
        elif module is network.head and tied:
            continue
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            generator = named_generator(f"{seed}/{name}")
            fresh = torch.randn(module.weight.shape, generator=generator, device="cpu")
            put(module.weight, fresh * (std_out if module in write_to_residual else std))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


class GPT(Decoder):
    """GPT-2: learned positions, pre-norm, tied embeddings."""

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int,
        dim: int,
        blocks: Sequence[nn.Module],
        dropout: float = 0.0,
    ) -> None:
        positions = nn.Embedding(max_seq_len, dim)
        norm = nn.LayerNorm(dim)
        super().__init__(vocab_size, max_seq_len, dim, blocks, norm, dropout, positions)
        self.head.weight = self.tokens.weight


class Llama(Decoder):
    """LLaMA-2: no position embeddings, RMSNorm, untied output weights, no biases.

    Rotary positions (blocks/rotary.py) and grouped-query attention (blocks/sublayers.py) are in the
    blocks, SwiGLU in MLPs and experts.
    """

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int,
        dim: int,
        blocks: Sequence[nn.Module],
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(vocab_size, max_seq_len, dim, blocks, nn.RMSNorm(dim, norm_eps), dropout)
