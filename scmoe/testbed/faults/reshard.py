"""A checkpoint of one EP degree is loaded at another: every tensor must be equal."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe.parallel.checkpoint.loading import load_checkpoint
from scmoe.parallel.checkpoint.saving import Saving
from scmoe.parallel.mesh import expert_parameters
from scmoe.testbed.faults.tiny_run import EXPERTS, LAST, OLD, one_step, progress, same, state, tensors
from scmoe.testbed.ranks import run_ranks


def write_whole(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Save the state after one step, where moments and experts all differ. Returns it."""
    trainer = one_step(world_size, folder)
    path, context = folder / "checkpoints" / LAST, trainer.strategy.context
    Saving(path, state(trainer, OLD), context, background=False).finish()
    return shards(trainer)


def read_all(rank: int, world_size: int, folder: Path, paths: list[Path]) -> list[dict[str, Any]]:
    trainer, found = one_step(world_size, folder), []
    for path in paths:
        for t in tensors(trainer).values():
            t.fill_(-1)
        load_checkpoint(path, trainer.lightning_module, trainer.optimizers, trainer.strategy.context)
        found.append(shards(trainer))
    return found


def shards(trainer: Any) -> dict[str, Any]:
    experts = {name for name, _ in expert_parameters(trainer.lightning_module)}
    return {"experts": experts, **{name: t.clone() for name, t in tensors(trainer).items()}}


def whole(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Concatenate the experts of all ranks by their global ids; the rest must be equal on all ranks."""
    together = {}
    for name, t in ranks[0].items():
        if name == "experts":
            continue
        if name.split("/")[0] in ranks[0]["experts"] and t.dim():
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
            for i, expected in enumerate(written):
                pairs += 1
                equal += same(whole([found[i] for found in ranks]), expected)
    return {"pairs": pairs, "equal": equal}
