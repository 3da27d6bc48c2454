"""The part of a datamodule that knows where in the data training stands, whatever the samples are.

Run the Trainer with `use_distributed_sampler=False`, and call `advance()` at the end of every training batch. Order and
resuming are told in `order.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.order import EvalBatches, TrainBatches
from datamodules.watched import Watched


class PositionedDataModule(LightningDataModule):
    """Position, checkpoint state and place among the ranks.

    `global_batch_size` samples make one optimizer step, over all ranks and `accumulate` micro-batches; `num_batches`
    is the training's number of micro-batches, max_steps x accumulate; `consumed_samples` the position in the order.
    """

    def __init__(self, *, global_batch_size: int, accumulate: int, num_batches: int, workers: int, seed: int) -> None:
        super().__init__()
        if global_batch_size < 1 or accumulate < 1 or global_batch_size % accumulate:
            raise ValueError(
                f"data.global_batch_size is {global_batch_size}; allowed: multiples of trainer.accumulate, {accumulate}"
            )
        self.global_batch_size, self.accumulate = global_batch_size, accumulate
        self.micro_batch = global_batch_size // accumulate
        self.num_batches = num_batches
        self.workers = workers
        self.seed = seed
        self.consumed_samples = 0
        self.watching: list[Watched] = []

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a position in the data to mean the same samples."""
        raise NotImplementedError

    def advance(self) -> None:
        """Notes that one micro-batch has been trained on."""
        self.consumed_samples += self.micro_batch

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed_samples, **self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the saved position. ValueError where it would mean other samples: other data, seed or length."""
        for key, ours in self.identity().items():
            if state_dict[key] != ours:
                raise ValueError(
                    f"the checkpoint's {key} is {state_dict[key]}, here it is {ours}: its position in the data means "
                    "nothing here; resume with the data settings and seed of that run"
                )
        self.consumed_samples = state_dict["consumed_samples"]

    def loader(
        self, dataset: Dataset, batches: TrainBatches | EvalBatches, collate: Callable[..., Any] | None = None
    ) -> DataLoader:
        """Of train, val or test. It draws the seeds of its workers from a generator of its own: each time it begins, it
        would take a number from the global one, and dropout would depend on whether there was a validation."""
        rank, _ = self.rank_and_world()
        return DataLoader(
            self.watched(dataset),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            generator=torch.Generator().manual_seed(self.seed + rank),
        )

    def watched(self, dataset: Dataset) -> Dataset:
        """What a loader with `workers` is made of, so that a worker that dies takes its sample's name not along."""
        if not self.workers:
            return dataset
        self.watching.append(Watched(dataset, self.workers))
        return self.watching[-1]

    def on_exception(self, exception: BaseException) -> None:
        for dataset in self.watching:
            dataset.note(exception)

    def rank_and_world(self) -> tuple[int, int]:
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if self.micro_batch % world:
            raise ValueError(
                f"data.global_batch_size is {self.global_batch_size}; allowed: multiples of ranks x "
                f"trainer.accumulate, {world} x {self.accumulate}"
            )
        return rank, world
