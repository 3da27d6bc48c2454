"""The learning rate over the steps of a training, as a share of its peak.

    cosine      warm-up, then half a cosine
    wsd         warm-up, a stable phase at the peak, then a straight decay (Hu et al., MiniCPM,
                arXiv 2404.06395; straight, and a fifth of the steps, as in arXiv 2405.18392)
    constant    warm-up, then the peak

A rate depends on the step only, so a resumed run has the same ones.
"""

import math
from dataclasses import dataclass
from typing import Literal

DECAYING = 5  # without decay_steps, one step of so many is in the decay of wsd


@dataclass(frozen=True)
class LearningRate:
    """max_steps: where a decay reaches min_ratio. decay_steps: of wsd; None: a fifth of max_steps.
    If the warm-up leaves fewer steps, the decay has all of these."""

    kind: Literal["cosine", "wsd", "constant"]
    max_steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.1
    decay_steps: int | None = None

    def ratio(self, step: int) -> float:
        """Return the learning rate of a step over its peak. Steps count from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        above_min = 1 - self.min_ratio
        if self.kind == "wsd":
            return self.min_ratio + above_min * (1 - self.progress(step, self.decay_start))
        progress = self.progress(step, self.warmup_steps)
        return self.min_ratio + above_min * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def decay_start(self) -> int:
        """The step after which the rate of wsd falls."""
        decay_steps = self.decay_steps
        if decay_steps is None:
            decay_steps = math.ceil(self.max_steps / DECAYING)
        return max(self.warmup_steps, self.max_steps - decay_steps)

    def progress(self, step: int, start: int) -> float:
        """Return the share that has passed of the steps from `start` to the last one."""
        if step >= self.max_steps:
            return 1.0
        return max(0.0, (step - start) / (self.max_steps - start))
