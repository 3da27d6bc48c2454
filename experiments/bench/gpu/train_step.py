"""A training step of a configured language model on one device, without a Trainer."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from scmoe.config.fields import Config
from scmoe.moe.balance import integer_sums, load_balance_loss
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.model import build_model


class TrainStep:
    """Forward under bf16 autocast, loss with balance, backward, clipping, AdamW; on random tokens [samples, S].

    capacity_factor: None makes the experts dropless.
    """

    def __init__(self, config: Config, device: torch.device, samples: int, capacity_factor: float | None) -> None:
        self.config = replace(config, moe=replace(config.moe, capacity_factor=capacity_factor))
        self.device, self.samples = device, samples
        self.model: Any = build_model(self.config, ParallelContext()).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.data.vocab_size, (samples, config.data.seq_len + 1), generator=generator)
        self.ids = ids.to(device)

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits_BSV, stats = self.model(self.ids[:, :-1])
        nats = F.cross_entropy(logits_BSV.flatten(0, 1).float(), self.ids[:, 1:].flatten())
        return nats + self.config.moe.load_balance_coef * load_balance_loss(stats, integer_sums(stats))

    def __call__(self) -> None:
        with record_function("step"):
            with record_function("forward"):
                loss = self.loss()
            with record_function("backward"):
                loss.backward()
            with record_function("update"):
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def held_bytes(self) -> int:
        """Bytes of weights and optimizer state."""
        state = [v for own in self.optimizer.state.values() for v in own.values() if isinstance(v, Tensor)]
        return sum(t.nbytes for t in [*self.model.parameters(), *state])
