"""Finds the sample that a data worker was reading when it died or raised; PyTorch names only the worker."""

import os
import re
from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")  # it was killed, or has exited
RAISED = re.compile(r"in DataLoader worker process (\d+)")


class Watched(Dataset):
    """Wraps `dataset`: workers note each sample before they read it, in memory shared with the loader's process."""

    def __init__(self, dataset: Dataset, workers: int) -> None:
        self.dataset = dataset
        self.reading_W2 = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()  # process, sample

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        if worker := get_worker_info():
            self.reading_W2[worker.id] = torch.tensor([os.getpid(), i])
        return self.dataset[i]

    def note(self, error: BaseException) -> None:
        """Add to a DataLoader's error about a worker the sample that this worker was reading."""
        text = str(error)
        pids = [int(pid) for found in DEAD.findall(text) for pid in found.split(",")]
        raised = [int(worker) for worker in RAISED.findall(text)]
        name = type(self.dataset).__name__
        for worker, (pid, sample) in enumerate(self.reading_W2.tolist()):
            if sample >= 0 and (pid in pids or worker in raised):
                error.add_note(f"data worker {worker} (pid {pid}) was reading sample {sample} of {name}")
