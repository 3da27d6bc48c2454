"""GPT-2's decoder (learned positions, pre-norm, tied embeddings) over any stack of blocks."""

from collections.abc import Sequence

from torch import nn

from scmoe.models.decoder import Decoder


class GPT(Decoder):
    def __init__(
        self, vocab_size: int, max_seq_len: int, dim: int, blocks: Sequence[nn.Module], dropout: float = 0.0
    ) -> None:
        positions = nn.Embedding(max_seq_len, dim)
        super().__init__(vocab_size, max_seq_len, dim, blocks, nn.LayerNorm(dim), dropout, positions)
        self.head.weight = self.tokens.weight
