"""Debug mode for collectives (fault 15): ranks compare what each is about to do before they do it.

Two ranks that swap two all-reduces of the same shape add up the wrong tensors without an error;
other mix-ups hang until the timeout. With `strategy.debug_collectives` every collective that Python
starts is first described to all ranks over a separate gloo group: operation, shape, type, group,
and the line of code that calls it. The first difference raises an error on every rank. All ranks
then run in lockstep, so this mode is for finding a fault, not for training.

Left out: collectives that DDP starts from C++ (DDP compares its buckets itself when it builds
them); gradients that are paced, on a thread and groups of their own; checkpoints, which may be
written in parallel with training; single sends and receives, which concern only two ranks.
"""

import inspect
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.parallel.wire import all_to_all

TENSORS = (
    *("all_reduce", "broadcast", "reduce", "gather", "scatter", "all_gather", "reduce_scatter"),
    *(
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_to_all",
        "all_to_all_single",
        "barrier",
    ),
    *("all_gather_single", "reduce_scatter_single"),  # FSDP's
)
OBJECTS = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list")
WATCHED: tuple[tuple[Any, str], ...] = (
    *((dist, name) for name in (*TENSORS, *OBJECTS)),
    (all_to_all, "point_to_point"),
)
ROWS = (
    "all_to_all",
    "all_to_all_single",
    "point_to_point",
)  # rows differ by rank: only the width is compared


class OrderError(RuntimeError):
    """Ranks were about to take part in different collectives."""


class CompareCollectives:
    """While installed, the functions in WATCHED compare first. Every rank must construct it: it
    makes a group."""

    def __init__(self, timeout: timedelta) -> None:
        self.group: Any = dist.new_group(backend="gloo", timeout=timeout, group_desc="debug")
        self.gather = dist.all_gather_object  # the original, which compares nothing
        self.originals: list[tuple[Any, str, Callable[..., Any]]] = []
        self.count = 0

    def install(self) -> None:
        for module, name in WATCHED:
            self.originals.append((module, name, getattr(module, name)))
            setattr(module, name, self._comparing(name, getattr(module, name)))

    def remove(self) -> None:
        for module, name, original in self.originals:
            setattr(module, name, original)
        self.originals.clear()

    def _comparing(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def collective(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            group = given.get("group")
            if group is None or group.group_desc != "checkpoint":
                target = next(
                    iter(given.values()), None
                )  # a tensor or a list of tensors; a barrier has none
                target = target[0] if isinstance(target, (list, tuple)) and target else target
                self.compare(_describe(name, target, group))
            return original(*args, **kwargs)

        return collective

    def compare(self, mine: str) -> None:
        of_ranks: list[Any] = [None] * dist.get_world_size()
        try:
            self.gather(of_ranks, mine, group=self.group)
        except RuntimeError as error:  # another rank did not come
            error.add_note(
                f"rank {dist.get_rank()} waited for the others at collective {self.count}: {mine}"
            )
            raise
        if len(set(of_ranks)) > 1:
            lines = [f"rank {rank}: {what}" for rank, what in enumerate(of_ranks)]
            raise OrderError(
                f"collective {self.count} is not the same on all ranks; " + "; ".join(lines)
            )
        self.count += 1


def _describe(name: str, tensor: Any, group: Any) -> str:
    what = name
    if isinstance(tensor, Tensor) and name not in OBJECTS:
        what += (
            f" of {tensor.dtype} {tuple(tensor.shape[1:]) if name in ROWS else tuple(tensor.shape)}"
        )
    return f"{what} in group {'default' if group is None else group.group_desc} at {_caller()}"


def _caller() -> str:
    """Return file and line of the innermost call outside of torch and this file."""
    torch_folder, frame = str(Path(torch.__file__).parent), sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(torch_folder)
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
