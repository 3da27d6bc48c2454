"""LLaMA-2's decoder over any stack of blocks: no position embeddings, RMSNorm, output weights of its own, no biases.

What else makes it LLaMA is in the blocks' parts: rotary positions and grouped-query attention (blocks/sublayers.py),
SwiGLU in MLPs and experts (moe/activation.py). Weights are drawn, and text is generated, as for GPT (models/gpt.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from scmoe.models.decoder import LMOutput, check_length, init_gpt_weights, run_blocks

NORM_EPS = 1e-5  # of every RMSNorm


class Llama(nn.Module):
    """blocks: called as block(x_BSD, mask_BS), each gives an MoEOutput."""

    def __init__(
        self, vocab_size: int, max_seq_len: int, dim: int, blocks: Sequence[nn.Module], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.tokens = nn.Embedding(vocab_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, NORM_EPS)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> LMOutput:
        """mask_BS False: padding, at the end of a sequence. Logits of the next token."""
        check_length(ids_BS, self.max_seq_len)
        x_BSD, stats = run_blocks(self.blocks, self.dropout(self.tokens(ids_BS)), mask_BS)
        return LMOutput(self.head(self.norm(x_BSD)), stats)

    def init_weights(self, seed: int) -> None:
        init_gpt_weights(self, seed)
