"""Makes Lightning know the strategy's name, and read a checkpoint that is a directory of ours.

Called by `import scmoe`, perhaps while other files of scmoe are being imported, so all imports are
inside functions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def teach_lightning() -> None:
    from lightning.fabric.plugins.io import torch_io
    from lightning.pytorch.core import saving
    from lightning.pytorch.strategies import StrategyRegistry

    what = "DDP for dense weights, expert parallelism for experts"
    StrategyRegistry.register("expert_parallel", expert_parallel, what, override=True)
    for module in (saving, torch_io):  # load_from_checkpoint, and a Trainer with any other strategy
        module.pl_load = reading_directories(module.pl_load)  # type: ignore[attr-defined]


def expert_parallel(**arguments: Any) -> Any:
    from scmoe.lightning.strategy import ExpertParallelStrategy

    return ExpertParallelStrategy(**arguments)


def reading_directories(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return `load`, which reads one file, with our directories read by one process too."""

    def read(path: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        from torch import Tensor

        from scmoe.parallel.checkpoint.durable import MANIFEST
        from scmoe.parallel.checkpoint.loading import read_for_lightning

        if not isinstance(path, (str, Path)) or not (Path(path) / MANIFEST).is_file():
            return load(path, map_location, *args, **kwargs)
        checkpoint, device = read_for_lightning(Path(path)), place_of(map_location)
        for name, entry in checkpoint["state_dict"].items():
            if isinstance(entry, Tensor):  # not every extra state is one
                checkpoint["state_dict"][name] = entry.to(device)
        return checkpoint

    return read


def place_of(map_location: Any) -> Any:
    """Return the device to which torch.load would move tensors of the CPU. map_location: as
    torch.load takes it."""
    import torch

    if callable(map_location):
        moved = map_location(torch.UntypedStorage(0), "cpu")
        return "cpu" if moved is None else moved.device
    if isinstance(map_location, dict):
        return map_location.get("cpu", "cpu")
    return "cpu" if map_location is None else map_location
