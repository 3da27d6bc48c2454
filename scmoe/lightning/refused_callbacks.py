"""Callbacks of Lightning that cannot work where each rank holds other experts."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

COPYING = (WeightAveraging, StochasticWeightAveraging)  # their copy of the module would hold one rank's experts


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Raise ValueError for a callback that averages weights in a copy of the module."""
    for callback in callbacks:
        if isinstance(callback, COPYING):
            raise ValueError(
                f"the callback {type(callback).__name__} keeps a copy of the module, with one rank's experts alone; "
                "allowed with expert_parallel: callbacks that do not copy it; average weights of checkpoints instead"
            )
