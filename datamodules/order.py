"""Which sample comes when, on which rank: a function of the global sample position only.

Training sees positions p = 0, 1, 2, ...; position p is sample `permutation(p // N)[p % N]` of the N samples. A
micro-batch takes the next M positions and deals them to the ranks in turn. Hence any number of ranks sees the same
global batches in the same order, batches run on across epochs, and one number is all that resuming needs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


class SampleOrder:
    """Maps positions to samples. Each epoch is another permutation of the samples, drawn at its first use."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._permutation_N = -1, np.empty(0, np.int64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the samples at `positions`, both int64 of one shape. positions: ascending."""
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


@dataclass(frozen=True)
class TrainBatches:
    """A batch sampler that yields this rank's share of every micro-batch from position `start()` on.

    `len` is the number of micro-batches of the whole training, also after a resume: Lightning subtracts those that are
    done. The position is read once, when iteration starts, as workers then fetch ahead of the training.
    """

    order: Callable[[np.ndarray], np.ndarray]
    num_batches: int
    micro_batch: int
    rank: int
    world: int
    start: Callable[[], int]

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        end = self.num_batches * self.micro_batch
        for first in range(self.start(), end - self.micro_batch + 1, self.micro_batch):
            positions = np.arange(first + self.rank, first + self.micro_batch, self.world)
            yield self.order(positions).tolist()


class EvalBatches:
    """A batch sampler that deals samples 0 ... N-1 to the ranks in turn, in equally many batches of one shape.

    Samples from N on are filler, which the data set must recognise: every rank must take part in all collectives.
    """

    def __init__(self, num_samples: int, batch: int, rank: int, world: int) -> None:
        self.num_batches = -(-num_samples // (batch * world))
        self.batch, self.rank, self.world = batch, rank, world

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.batch * self.world
        for first in range(0, self.num_batches * stride, stride):
            yield list(range(first + self.rank, first + stride, self.world))
