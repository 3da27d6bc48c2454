"""A checkpoint of one EP degree is loaded at another: every tensor must be equal."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scmoe.parallel.checkpoint.loading import load_checkpoint
from scmoe.parallel.checkpoint.saving import Saving
from scmoe.testbed.faults.tiny_run import EXPERTS, LAST, OLD, mark, one_step, progress, same, state, tensors
from scmoe.testbed.ranks import run_ranks


def write_whole(rank: int, world_size: int, folder: Path) -> dict[str, Tensor]:
    """Save the state after one step, where moments and experts all differ. Returns it."""
    trainer = one_step(world_size, folder)
    path, context = folder / "checkpoints" / LAST, trainer.strategy.context
    Saving(path, state(trainer, OLD), context, background=False).finish()
    return tensors(trainer)


def read_all(rank: int, world_size: int, folder: Path, paths: list[Path]) -> list[dict[str, Tensor]]:
    trainer, found = one_step(world_size, folder), []
    for path in paths:
        mark(trainer, -1)
        load_checkpoint(path, trainer.lightning_module, trainer.optimizers, trainer.strategy.context)
        found.append({name: t.clone() for name, t in tensors(trainer).items()})
    return found


def whole(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the experts of all ranks by their global ids; the rest must be equal on all ranks."""
    together = {}
    for name, t in ranks[0].items():
        if ".experts." in name and t.dim():
            together[name] = torch.cat([rank[name] for rank in ranks])
            assert len(together[name]) == EXPERTS
        else:
            assert all(torch.equal(rank[name], t) for rank in ranks), f"replicas of {name} differ"
            together[name] = t
    return together


def reshard(degrees: Sequence[int] = (1, 2, 4, 8)) -> dict[str, int]:
    """degrees: each runs on as many ranks."""
    pairs = equal = 0
    with tempfile.TemporaryDirectory() as name:
        folders = {ep: Path(name) / f"ep{ep}" for ep in degrees}
        written = [whole(run_ranks(write_whole, ep, folder)) for ep, folder in folders.items()]
        paths = [folder / "checkpoints" / LAST for folder in folders.values()]
        for ep in progress(degrees, "reading"):
            ranks = run_ranks(read_all, ep, folders[ep] / "read", paths)
            pairs += len(written)
            equal += sum(same(whole([found[i] for found in ranks]), expected) for i, expected in enumerate(written))
    return {"pairs": pairs, "equal": equal}
