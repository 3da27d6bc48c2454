"""Adds an architecture, a data set, an optimizer and a callback to scmoe, without a change of
scmoe.

`extensions: [docs.examples.my_architecture]` in a config imports this file; docs/extending.md
explains it.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import scmoe
from scmoe.blocks.build import Parts
from scmoe.blocks.kv_cache import KVCache
from scmoe.config.fields import Config
from scmoe.datamodules.sequences import SequenceDataModule, TokenSplits
from scmoe.moe.stream import MoEStream
from scmoe.moe.tokens import MoEOutput
from scmoe.parallel.wire.wire import Wire
from scmoe.training.assembly.blocks import build_stream
from scmoe.training.muon import Trained


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + MoE(norm(x)): all of the block's attention hides the experts'
    transfers."""

    def __init__(self, attention: nn.Module, norm: nn.Module, moe: MoEStream) -> None:
        super().__init__()
        self.attention, self.norm, self.moe = attention, norm, moe

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None, cache: KVCache | None = None
    ) -> MoEOutput:
        state = self.moe.begin(self.norm(x_BSD), mask_BS)  # the rows are on their way
        attended_BSD = self.attention(x_BSD, cache)
        routed_BSD, stats = self.moe.finish(self.moe.run_experts(state))
        return MoEOutput(attended_BSD + routed_BSD, stats)


@scmoe.register_architecture("parallel")
def parallel(config: Config, wire: Wire, parts: Sequence[Parts]) -> list[nn.Module]:
    """Return the blocks of all layers. parts: of the model family, for each layer."""
    return [
        ParallelBlock(p.attention_sublayer(), p.norm(), build_stream(config, wire, p))
        for p in parts
    ]


class Counting(SequenceDataModule):
    """Count modulo the vocabulary in steps of `stride`; a model learns it within a few steps."""

    def __init__(self, vocab_size: int, stride: int, **sequences: Any) -> None:
        super().__init__(**sequences)
        self.vocab_size, self.stride = vocab_size, stride

    @cached_property
    def splits(self) -> TokenSplits:
        lengths = {"train": 1 << 16, "val": 1 << 12, "test": 1 << 12}
        tokens = {
            split: np.arange(length) * self.stride % self.vocab_size
            for split, length in lengths.items()
        }
        return TokenSplits(
            tokens, np.ones(self.vocab_size, np.int64), f"counting-{self.vocab_size}-{self.stride}"
        )


@scmoe.register_dataset("counting")
def counting(config: Config, position: Mapping[str, Any]) -> Counting:
    """position: batch size, seed and the like, for every data set. `options` holds what only this
    file reads."""
    data, stride = config.data, config.options.get("stride", 1)
    return Counting(
        data.vocab_size, stride, seq_len=data.seq_len, val_sequences=data.val_sequences, **position
    )


@scmoe.register_optimizer("sgd")
def sgd(config: Config, parameters: Trained) -> torch.optim.Optimizer:
    decayed = {
        "params": [*parameters.matrices, *parameters.decayed],
        "weight_decay": config.optim.weight_decay,
    }
    return torch.optim.SGD(
        [decayed, {"params": parameters.undecayed}], lr=config.optim.lr, momentum=0.9
    )


@scmoe.register_callback("surprise")
class Surprise(Callback):
    """Print the perplexity, exp(loss), every `every` steps. Every rank has this callback; rank 0
    prints."""

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        if trainer.is_global_zero and trainer.global_step % self.every == 0:
            tokens = math.exp(outputs["loss"].item())
            print(f"step {trainer.global_step}: between {tokens:.0f} tokens", file=sys.stderr)
