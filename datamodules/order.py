"""Which sample comes when, on which rank: a function of the global sample position only.

Training sees positions p = 0, 1, 2, ...; position p is sample `permutation(p // N)[p % N]` of the N samples. A
micro-batch takes the next M positions and deals them to the ranks in turn. Hence any number of ranks sees the same
global batches in the same order, batches run on across epochs, and one number is all that resuming needs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1)
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


@dataclass(frozen=True)
class SampleOrder:
    """Maps positions to samples. Each epoch is another permutation of the samples."""

    num_samples: int
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the samples at `positions`, both int64 of one shape. positions: ascending."""
        epochs, places = np.divmod(positions, self.num_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = permutation(self.num_samples, self.seed, int(epoch))[places[here]]
        return samples


@dataclass(frozen=True)
class Repeated:
    """Repeats the samples of the first `period` positions. period: a multiple of the micro-batch."""

    order: Callable[[np.ndarray], np.ndarray]
    period: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return self.order(positions % self.period)


@dataclass(frozen=True)
class Batches:
    """A batch sampler that yields this rank's share of every micro-batch from position `start()` on.

    order: positions to the items of a data set.
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
