"""Which sample comes when, on which rank: a function of the global sample position only.

Training sees positions p = 0, 1, 2, ...; position p is sample `permutation(p // N)[p % N]` of the N
samples. A micro-batch takes the next M positions, and the ranks take them in turn. So any number of
ranks sees the same global batches in the same order, batches run on across epochs, and one number
is all that resuming needs.

`PositionedDataModule` keeps this number in checkpoints. Run the Trainer with
`use_distributed_sampler=False`, and call `advance()` at the end of every training batch.
"""

import os
import re
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, get_worker_info

DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")  # it was killed, or has exited
RAISED = re.compile(r"in DataLoader worker process (\d+)")
IGNORE = -100  # the label that cross_entropy leaves out


@lru_cache(maxsize=1)
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


@dataclass(frozen=True)
class SampleOrder:
    """A map from positions to samples. Each epoch is another permutation of the samples."""

    num_samples: int
    seed: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the samples at `positions`, both int64 of one shape. positions: ascending."""
        epochs, places = np.divmod(positions, self.num_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = permutation(self.num_samples, self.seed, int(epoch))[places[here]]
        return samples


@dataclass(frozen=True)
class Batches:
    """A batch sampler that yields this rank's share of every micro-batch from position `start()`
    on.

    order: positions to the items of a data set. `len` is the number of micro-batches of the whole
    training, also after a resume: Lightning subtracts those that are done. The position is read
    once, when iteration starts, as workers then fetch ahead of the training.
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


class PositionedDataModule(LightningDataModule):
    """A data module that keeps its position in checkpoints and makes the loaders of its rank.

    global_batch_size: samples of one optimizer step, of all ranks and `accumulate` micro-batches
    together. num_batches: micro-batches of the whole training, max_steps x accumulate. overfit:
    train on the first micro-batches of the order only, this many, repeatedly; None: on all samples.
    `consumed_samples` is the position in the order of samples. `skipped` has a line for each file
    that is left out, with the reason.
    """

    def __init__(
        self,
        global_batch_size: int = 32,
        accumulate: int = 1,
        num_batches: int = 200,
        workers: int = 0,
        seed: int = 1,
        overfit: int | None = None,
    ) -> None:
        super().__init__()
        if global_batch_size < 1 or accumulate < 1 or global_batch_size % accumulate:
            raise ValueError(
                f"data.global_batch_size is {global_batch_size}; allowed: multiples of"
                f" trainer.accumulate, {accumulate}"
            )
        self.global_batch_size = global_batch_size
        self.accumulate = accumulate
        self.micro_batch = global_batch_size // accumulate
        self.num_batches = num_batches
        self.workers = workers
        self.seed = seed
        self.overfit = overfit
        self.consumed_samples = 0
        self.watching: list[Watched] = []
        self.skipped: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """Return all that must be equal for a position to mean the same samples."""
        raise NotImplementedError

    def unreadable(self) -> list[str]:
        """Read all data, and return a line for each file that cannot be read."""
        return list(self.skipped)

    def advance(self) -> None:
        self.consumed_samples += self.micro_batch

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed_samples, **self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved position. Raises ValueError where it would mean other samples."""
        for key, ours in self.identity().items():
            if state_dict[key] != ours:
                raise ValueError(
                    f"the checkpoint's {key} is {state_dict[key]}, here it is {ours}: its position"
                    " means other samples; resume with the data settings and seed of that run"
                )
        self.consumed_samples = state_dict["consumed_samples"]

    def train_loader(
        self, dataset: Dataset, order: Callable[..., Any], collate: Callable[..., Any] | None = None
    ) -> DataLoader:
        """Return the loader of the training from the current position on.

        order: positions to items of `dataset`.
        """
        period = (self.overfit or self.num_batches) * self.micro_batch

        def repeated(positions: np.ndarray) -> np.ndarray:
            return order(positions % period)

        def start() -> int:
            return self.consumed_samples

        return self._loader(dataset, repeated, self.num_batches, start, collate)

    def eval_loader(self, dataset: Sized) -> DataLoader:
        """Return a loader that gives all ranks equally many batches of one shape, as all must take
        part in collectives.

        Items from `len(dataset)` on are filler, which `dataset` must recognise.
        """
        num_batches = -(-len(dataset) // self.micro_batch)
        return self._loader(dataset, np.asarray, num_batches, lambda: 0, None)

    def _loader(
        self,
        dataset: Any,
        order: Any,
        num_batches: int,
        start: Callable[[], int],
        collate: Callable[..., Any] | None,
    ) -> DataLoader:
        rank, world = self.rank_and_world()
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        if self.workers:
            dataset = Watched(dataset, self.workers)
            self.watching.append(dataset)
        return DataLoader(
            dataset,
            batch_sampler=Batches(order, num_batches, self.micro_batch, rank, world, start),
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=on_gpu,  # else a copy to the GPU waits for the stream
            # For the seeds of workers. Else each start of a loader would draw from the global
            # generator, and dropout would depend on whether there was a validation.
            generator=torch.Generator().manual_seed(self.seed + rank),
        )

    def on_exception(self, exception: BaseException) -> None:
        for dataset in self.watching:
            dataset.note(exception)

    def rank_and_world(self) -> tuple[int, int]:
        """Return the rank and the number of ranks, (0, 1) without a Trainer.

        Raises ValueError if a micro-batch cannot be divided among the ranks.
        """
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        if self.micro_batch % world:
            raise ValueError(
                f"data.global_batch_size is {self.global_batch_size}; allowed: multiples of ranks x"
                f" trainer.accumulate, {world} x {self.accumulate}"
            )
        return rank, world


class Watched(Dataset):
    """A data set that names the sample that a data worker was reading when it died or raised.
    PyTorch names only the worker.

    Workers note each sample of `dataset` before they read it, in memory shared with the loader's
    process.
    """

    def __init__(self, dataset: Dataset, workers: int) -> None:
        self.dataset = dataset
        # of each worker: its process, the sample that it reads (-1: none), 1 if that has raised
        self.reading_W3 = torch.full((workers, 3), -1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        worker = get_worker_info()
        # a worker reads on after an error, but the sample that has raised stays noted
        if worker is None or self.reading_W3[worker.id, 2] == 1:
            return self.dataset[i]
        self.reading_W3[worker.id] = torch.tensor([os.getpid(), i, 0])
        try:
            item = self.dataset[i]
        except Exception:
            self.reading_W3[worker.id, 2] = 1
            raise
        self.reading_W3[worker.id, 1] = -1
        return item

    def note(self, error: BaseException) -> None:
        """Add to a DataLoader's error about a worker the sample that this worker was reading."""
        text = str(error)
        pids = [int(pid) for group in DEAD.findall(text) for pid in group.split(",")]
        raised = [int(worker) for worker in RAISED.findall(text)]
        name = type(self.dataset).__name__
        for worker, (pid, sample, has_raised) in enumerate(self.reading_W3.tolist()):
            if sample >= 0 and (pid in pids or (has_raised == 1 and worker in raised)):
                error.add_note(
                    f"data worker {worker} (pid {pid}) was reading sample {sample} of {name}"
                )
