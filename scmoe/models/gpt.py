"""GPT-2's decoder (learned positions, pre-norm, tied embeddings) over any stack of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scmoe.models.decoder import LMOutput, check_length, init_gpt_weights, run_blocks


class GPT(nn.Module):
    """blocks: called as block(x_BSD, mask_BS), each gives an MoEOutput."""

    def __init__(
        self, vocab_size: int, max_seq_len: int, dim: int, blocks: Sequence[nn.Module], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_seq_len, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> LMOutput:
        """mask_BS False: padding, at the end of a sequence. Logits of the next token."""
        check_length(ids_BS, self.max_seq_len)
        steps_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        x_BSD = self.dropout(self.tokens(ids_BS) + self.positions(steps_S))
        x_BSD, stats = run_blocks(self.blocks, x_BSD, mask_BS)
        return LMOutput(self.head(self.norm(x_BSD)), stats)

    def init_weights(self, seed: int) -> None:
        init_gpt_weights(self, seed)
