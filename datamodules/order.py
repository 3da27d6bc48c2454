"""Which sample comes when, on which rank: a function of the global sample position alone.

Training sees positions p = 0, 1, 2, ...; position p is sample `permutation(p // N)[p % N]` of the N samples. A
micro-batch takes the next M positions and deals them to the ranks in turn. Hence any number of ranks sees the same
global batches in the same order, batches run on across epochs, and one number is all that resuming needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np


class SampleOrder:
    """Position -> sample: each epoch is its own permutation of the samples, drawn when it is first asked for."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self._epoch, self._permutation_N = -1, np.empty(0, np.int64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the samples at `positions`, both int64 of one shape; positions ascend."""
        epochs, places = np.divmod(positions, self.num_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._permutation(int(epoch))[places[here]]
        return samples

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._permutation_N = epoch, generator.permutation(self.num_samples)
        return self._permutation_N


class TrainBatches:
    """Batch sampler: this rank's share of every micro-batch from position `start()` on.

    `len` is the whole training's number of micro-batches, also after a resume: Lightning subtracts those it has done.
    Iteration reads the position once, at its beginning, since workers fetch ahead of what has been trained on.
    """

    def __init__(
        self,
        order: Callable[[np.ndarray], np.ndarray],
        num_batches: int,
        micro_batch: int,
        rank: int,
        world: int,
        start: Callable[[], int],
    ) -> None:
        self.order = order
        self.num_batches = num_batches
        self.micro_batch = micro_batch
        self.rank, self.world = rank, world
        self.start = start

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        end = self.num_batches * self.micro_batch
        for first in range(self.start(), end - self.micro_batch + 1, self.micro_batch):
            positions = np.arange(first + self.rank, first + self.micro_batch, self.world)
            yield self.order(positions).tolist()


class EvalBatches:
    """Batch sampler: samples 0 ... N-1 dealt to the ranks in turn, in batches of one shape and the same number on each.

    Samples from N on are filler, which the data set has to recognise: collectives need every rank to take part.
    """

    def __init__(self, num_samples: int, batch: int, rank: int, world: int) -> None:
        self.num_batches = -(-num_samples // (batch * world))
        self.batch = batch
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.batch * self.world
        for first in range(0, self.num_batches * stride, stride):
            yield list(range(first + self.rank, first + stride, self.world))
