"""What language models share: the decoder, weight initialisation, generation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scmoe.blocks.sublayers import MLP, Attention
from scmoe.moe.experts import Experts, named_generator
from scmoe.tokens import RouterStats


class LMOutput(NamedTuple):
    logits_BSV: Tensor
    stats: list[RouterStats]  # one per MoE layer


class Decoder(nn.Module):
    """Embedding, blocks, norm, output products. GPT (gpt.py) and LLaMA (llama.py) choose the parts.

    blocks: each is called as block(x_BSD, mask_BS) and returns an MoEOutput.
    positions: learned embeddings of the positions; None: the blocks know the positions (rotary).
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
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> LMOutput:
        """Returns the logits of each next token. mask_BS False: padding, at the end of a sequence."""
        seq_len = ids_BS.shape[1]
        if seq_len > self.max_seq_len:
            raise ValueError(f"a sequence has {seq_len} tokens, allowed: up to data.seq_len, {self.max_seq_len}")
        x_BSD = self.tokens(ids_BS)
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(torch.arange(seq_len, device=ids_BS.device))
        x_BSD, all_stats = self.dropout(x_BSD), []
        for block in self.blocks:
            x_BSD, stats = block(x_BSD, mask_BS)
            all_stats += [] if stats is None else [stats]
        return LMOutput(self.head(self.norm(x_BSD)), all_stats)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's: N(0, 0.02); N(0, 0.02 / sqrt(2 layers)) for products that write to the residual stream.

        A weight depends only on the seed, its name and its shape: not on the rank, the EP degree, earlier draws or the
        rest of the model. So architectures that share a part start with equal weights there, and can be compared.
        """
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        std, std_out = 0.02, 0.02 / math.sqrt(2 * len(attentions))
        write_to_residual = {m.out for m in attentions} | {m.w_out for m in self.modules() if isinstance(m, MLP)}
        tied = self.head.weight is self.tokens.weight
        for name, module in self.named_modules():
            if isinstance(module, Experts):
                module.init_weights(f"{seed}/{name}", std, std_out)
            elif isinstance(module, (nn.Linear, nn.Embedding)) and (module is not self.head or not tied):
                generator = named_generator(f"{seed}/{name}")
                fresh = torch.randn(module.weight.shape, generator=generator, device="cpu")
                module.weight.copy_(fresh * (std_out if module in write_to_residual else std))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()

    def rows_per_sample(self, seq_len: int) -> dict[nn.Module, float]:
        """Rows that each module sees of one sample: its tokens."""
        return dict.fromkeys(self.modules(), float(seq_len))


@torch.no_grad()
def generate(
    model: Decoder, ids_BS: Tensor, num_tokens: int, *, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Tensor:
    """Appends num_tokens sampled tokens to each row; the model sees the last max_seq_len. temperature 0: the likeliest.

    With expert parallelism every rank must call it with the same arguments, because every rank runs each forward pass.
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
