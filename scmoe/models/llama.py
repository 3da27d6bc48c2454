"""LLaMA-2's decoder over any stack of blocks: no position embeddings, RMSNorm, output weights of its own, no biases.

The rest of LLaMA is in the parts of the blocks: rotary positions and grouped-query attention (blocks/sublayers.py),
SwiGLU in MLPs and experts (moe/activation.py).
"""

from collections.abc import Sequence

from torch import nn

from scmoe.models.decoder import Decoder

NORM_EPS = 1e-5  # of every RMSNorm


class Llama(Decoder):
    def __init__(
        self, vocab_size: int, max_seq_len: int, dim: int, blocks: Sequence[nn.Module], dropout: float = 0.0
    ) -> None:
        super().__init__(vocab_size, max_seq_len, dim, blocks, nn.RMSNorm(dim, NORM_EPS), dropout)
