"""These transfers deliver their rows late. They replace `all_to_all.point_to_point` inside the
ranks."""

import os
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from scmoe.parallel.wire import all_to_all

# is in a buffer until its rows arrive; NaN would show even where a real error is too small to show
POISON = 7.0


class Late:
    """This transfer delivers its rows at the wait and not before, which is the latest time that
    `dist.Work` allows."""

    def __init__(self, work: Any, arrived: Tensor, target: Tensor, rng: Random) -> None:
        self.work, self.arrived, self.target = work, arrived, target

    # a new thread has autograd on, and the copy as a node would change the order of backward
    @torch.no_grad()
    def wait(self) -> None:
        self.work.wait()
        self.target.copy_(self.arrived)


class Shuffled(Late):
    """This transfer delivers its rows 0 to 4 ms after its launch, so that later transfers overtake
    it."""

    def __init__(self, work: Any, arrived: Tensor, target: Tensor, rng: Random) -> None:
        super().__init__(work, arrived, target, rng)
        self.delivery = threading.Timer(rng.uniform(0.0, 0.004), super().wait)
        self.delivery.start()

    def wait(self) -> None:
        self.delivery.join()


def delayed(late: type[Late]) -> Callable[..., Late]:
    """Return a replacement of all_to_all.point_to_point whose buffer holds POISON until `late`
    delivers the rows."""
    rng = Random(os.environ["RANK"])
    real = all_to_all.point_to_point

    def start(target: Tensor, *args: Any) -> Late:
        arrived = torch.empty_like(target)
        return late(real(arrived, *args), arrived, target.fill_(POISON), rng)

    return start
