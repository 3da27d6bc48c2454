"""Checkpoints are restored: by a run that was interrupted, or in another layout (faults 8, 9 and
71).

A run that is interrupted at a step and resumed must end bit-identical to the run that was not. Of a
checkpoint that is loaded in another layout, every tensor must be equal. A layout is a number of
ranks, an EP degree, and where dense weights are (strategy.dense).
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from experiments.engine.ranks import run_ranks
from scmoe.parallel.checkpoint.saving import Saving
from tests.support.faults import tiny_run
from tests.support.faults.tiny_run import EXPERTS, LAST, OLD, WAYS

RESUME_STEPS = 6


def run(
    rank: int, world_size: int, workers: int, dense: str, folder: Path, resume_from: list[Path]
) -> list[dict[str, Any]]:
    """Return how a run ends, or runs that resume from checkpoints: tensors, learning rate, position
    in the data.

    They validate after every step, which restarts data loaders in between.
    """
    steps = (
        "trainer.accumulate=2",
        f"trainer.max_steps={RESUME_STEPS}",
        "trainer.checkpoint_every=1",
    )
    validation = "trainer.val_every=1", "data.val_sequences=16"
    ranks = f"data.workers={workers}", f"strategy.ep_size={world_size}", *WAYS[dense]
    config = tiny_run.tiny(world_size, *steps, *validation, *ranks)
    ends = []
    for i, path in enumerate(resume_from or [None]):
        trainer = tiny_run.fit(config, folder / str(i), path)
        lr = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"], dtype=torch.float64)
        consumed = torch.tensor(trainer.datamodule.consumed_samples)
        ends.append({**tiny_run.tensors(trainer), "lr": lr, "consumed": consumed})
    return ends


def resume(
    steps: int | None = None,
    worlds: Sequence[int] = (1, 2),
    workers: Sequence[int] = (0, 2),
    dense: str = "replicated",
) -> dict[str, int]:
    """Resume from steps of a run, and compare the ends. steps: the number of steps to resume from,
    None: all. dense: where dense weights are."""
    compared = bit_equal = 0
    for world_size, loaders in tiny_run.progress(
        [(w, n) for w in worlds for n in workers], "resuming"
    ):
        with tempfile.TemporaryDirectory() as name:
            straight = run_ranks(run, world_size, loaders, dense, Path(name) / "straight", [])
            saved = [
                Path(name) / "straight/0/checkpoints" / f"step={i}.ckpt"
                for i in range(1, RESUME_STEPS)
            ]
            saved = tiny_run.spread(saved, steps)
            resumed = run_ranks(run, world_size, loaders, dense, Path(name) / "resumed", saved)
        compared += len(saved)
        for i in range(len(saved)):
            bit_equal += all(
                tiny_run.same(ends[i], end) for ends, (end,) in zip(resumed, straight, strict=True)
            )
    return {"compared": compared, "bit_equal": bit_equal}


class Layout(NamedTuple):
    ranks: int
    ep_size: int
    dense: str = "replicated"

    @property
    def devices(self) -> int:
        """Return the ranks of a node: hybrid has two nodes."""
        return self.ranks // 2 if self.dense == "hybrid" else self.ranks

    def overrides(self) -> tuple[str, ...]:
        nodes = f"trainer.devices={self.devices}", f"trainer.num_nodes={self.ranks // self.devices}"
        return *nodes, f"strategy.ep_size={self.ep_size}", f"strategy.dense={self.dense}"


EP = tuple(Layout(ep, ep) for ep in (1, 2, 4, 8))
ALL = (  # every way of keeping dense weights
    *(Layout(1, 1), Layout(2, 2), Layout(4, 2), Layout(1, 1, "sharded"), Layout(2, 1, "sharded")),
    *(Layout(4, ep, dense) for dense in ("sharded", "hybrid") for ep in (1, 2, 4)),
    *(Layout(8, 2, "sharded"), Layout(8, 4, "hybrid")),
)


def trained(rank: int, folder: Path, layout: Layout) -> Any:
    os.environ.update(LOCAL_RANK=str(rank % layout.devices), GROUP_RANK=str(rank // layout.devices))
    return tiny_run.one_step(layout.ranks, folder, *layout.overrides())


def write_whole(rank: int, world_size: int, folder: Path, layout: Layout) -> dict[str, Tensor]:
    """Save the state after one step, where moments and experts all differ. Return it."""
    trainer = trained(rank, folder, layout)
    path, mesh = folder / "checkpoints" / LAST, trainer.strategy.mesh
    Saving(
        path, tiny_run.state(trainer, OLD), trainer.lightning_module, mesh, background=False
    ).finish()
    return gathered(trainer)


def read_all(
    rank: int, world_size: int, folder: Path, paths: list[Path], layout: Layout
) -> list[dict[str, Tensor]]:
    trainer, found = trained(rank, folder, layout), []
    for path in paths:
        tiny_run.mark(trainer, -1)
        tiny_run.load_into(trainer, path)
        found.append(gathered(trainer))
    return found


def gathered(trainer: Any) -> dict[str, Tensor]:
    """Return weights and moments with this rank's experts, whole."""
    named = tiny_run.named_tensors(trainer).items()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in named}


def whole(ranks: list[dict[str, Tensor]], ep_size: int) -> dict[str, Tensor]:
    """Concatenate the experts by their global ids; the rest must be equal on all ranks, and experts
    on ranks with the same ones."""
    together = dict(ranks[0])
    for name, t in ranks[0].items():
        holders = ranks[:1]
        if ".experts." in name and t.dim():
            holders = ranks[:ep_size]
            together[name] = torch.cat([rank[name] for rank in holders])
            assert len(together[name]) == EXPERTS
        for i, rank in enumerate(ranks):
            assert torch.equal(rank[name], holders[i % len(holders)][name]), (
                f"replicas of {name} differ"
            )
    return together


def reshard(layouts: Sequence[Layout]) -> dict[str, int]:
    """Write a checkpoint in each layout and read it in all of them."""
    pairs = equal = 0
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(i) for i in range(len(layouts))]
        paths, written = [folder / "checkpoints" / LAST for folder in folders], []
        for layout, folder in zip(tiny_run.progress(layouts, "writing"), folders, strict=True):
            written.append(
                whole(run_ranks(write_whole, layout.ranks, folder, layout), layout.ep_size)
            )
        for layout, folder in zip(tiny_run.progress(layouts, "reading"), folders, strict=True):
            ranks = run_ranks(read_all, layout.ranks, folder / "read", paths, layout)
            for i, expected in enumerate(written):
                pairs += 1
                equal += tiny_run.same(
                    whole([found[i] for found in ranks], layout.ep_size), expected
                )
    return {"pairs": pairs, "equal": equal}
