"""Registers the strategy's name with Lightning, and lets Lightning read our checkpoints.

Called by `import scmoe`, perhaps while other files of scmoe are being imported, so all imports are
inside functions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def register_with_lightning() -> None:
    """Register the strategy's name, and let Lightning's readers of files read our directories."""
    from lightning.fabric.plugins.io import torch_io
    from lightning.pytorch.core import saving
    from lightning.pytorch.strategies import StrategyRegistry

    description = "DDP for dense weights, expert parallelism for experts"
    StrategyRegistry.register("expert_parallel", expert_parallel, description, override=True)
    # for load_from_checkpoint, and for a Trainer with any other strategy
    for module in (saving, torch_io):
        module.pl_load = reading_directories(module.pl_load)  # type: ignore[attr-defined]


def expert_parallel(**arguments: Any) -> Any:
    from scmoe.lightning.strategy import ExpertParallelStrategy

    return ExpertParallelStrategy(**arguments)


def reading_directories(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that reads our directories in one process, and other files by `load`."""

    def read(path: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        from torch import Tensor

        from scmoe.parallel.checkpoint.loading import read_for_lightning
        from scmoe.parallel.checkpoint.remote import downloaded, has_manifest, located

        # http: Lightning reads it otherwise
        if not isinstance(path, (str, Path)) or str(path).startswith("http"):
            return load(path, map_location, *args, **kwargs)
        place = located(path)
        if not has_manifest(place):
            return load(path, map_location, *args, **kwargs)
        with downloaded(place) as folder:
            checkpoint = read_for_lightning(folder)
        device = device_of(map_location)
        for name, entry in checkpoint["state_dict"].items():
            if isinstance(entry, Tensor):  # not every extra state is one
                checkpoint["state_dict"][name] = entry.to(device)
        return checkpoint

    return read


def device_of(map_location: Any) -> Any:
    """Return the device to which torch.load would move tensors of the CPU.

    map_location: as torch.load takes it.
    """
    import torch

    if callable(map_location):
        moved = map_location(torch.UntypedStorage(0), "cpu")
        return "cpu" if moved is None else moved.device
    if isinstance(map_location, dict):
        return map_location.get("cpu", "cpu")
    return "cpu" if map_location is None else map_location
