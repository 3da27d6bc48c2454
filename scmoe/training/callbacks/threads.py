"""Sets the number of CPU threads of this process."""

from typing import Any

import torch
from lightning.pytorch import Callback


class Threads(Callback):
    """Sets it when training is set up: Lightning's launcher has set its own number before."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads

    def setup(self, *_: Any, **__: Any) -> None:
        torch.set_num_threads(self.num_threads)
