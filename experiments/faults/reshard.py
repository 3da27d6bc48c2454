"""A checkpoint of one layout is loaded in another: every tensor must be equal (faults 9 and 71).

A layout is a number of ranks, an EP degree, and where dense weights are (strategy.dense).
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from scmoe.experiments.engine.ranks import run_ranks
from scmoe.experiments.faults.tiny_run import EXPERTS, LAST, OLD, mark, named_tensors, one_step, progress, same, state
from scmoe.parallel.checkpoint.loading import load_checkpoint
from scmoe.parallel.checkpoint.saving import Saving


class Layout(NamedTuple):
    ranks: int
    ep_size: int
    dense: str = "replicated"

    @property
    def devices(self) -> int:
        """Ranks of a node: hybrid has two nodes."""
        return self.ranks // 2 if self.dense == "hybrid" else self.ranks

    def overrides(self) -> tuple[str, ...]:
        nodes = f"trainer.devices={self.devices}", f"trainer.num_nodes={self.ranks // self.devices}"
        return *nodes, f"strategy.ep_size={self.ep_size}", f"strategy.dense={self.dense}"


EP = tuple(Layout(ep, ep) for ep in (1, 2, 4, 8))
ALL = (
    *(Layout(1, 1), Layout(2, 2), Layout(4, 2), Layout(1, 1, "sharded"), Layout(2, 1, "sharded")),
    *(Layout(4, ep, dense) for dense in ("sharded", "hybrid") for ep in (1, 2, 4)),
    *(Layout(8, 2, "sharded"), Layout(8, 4, "hybrid")),
)


def trained(rank: int, folder: Path, layout: Layout) -> Any:
    os.environ.update(LOCAL_RANK=str(rank % layout.devices), GROUP_RANK=str(rank // layout.devices))
    return one_step(layout.ranks, folder, *layout.overrides())


def write_whole(rank: int, world_size: int, folder: Path, layout: Layout | None = None) -> dict[str, Tensor]:
    """Save the state after one step, where moments and experts all differ. Returns it. layout: None: EP over all."""
    trainer = trained(rank, folder, layout or Layout(world_size, world_size))
    path, context = folder / "checkpoints" / LAST, trainer.strategy.context
    Saving(path, state(trainer, OLD), context, background=False).finish()
    return gathered(trainer)


def read_all(
    rank: int, world_size: int, folder: Path, paths: list[Path], layout: Layout | None = None
) -> list[dict[str, Tensor]]:
    trainer, found = trained(rank, folder, layout or Layout(world_size, world_size)), []
    for path in paths:
        mark(trainer, -1)
        load_checkpoint(path, trainer.lightning_module, trainer.optimizers, trainer.strategy.context)
        found.append(gathered(trainer))
    return found


def gathered(trainer: Any) -> dict[str, Tensor]:
    """Return weights and moments with this rank's experts, whole."""
    named = named_tensors(trainer).items()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in named}


def whole(ranks: list[dict[str, Tensor]], ep_size: int | None = None) -> dict[str, Tensor]:
    """Concatenate the experts by their global ids; the rest must be equal on all ranks, and experts on ranks with the
    same ones. ep_size: None: all ranks."""
    together, ep_size = {}, ep_size or len(ranks)
    for name, t in ranks[0].items():
        if ".experts." in name and t.dim():
            together[name] = torch.cat([rank[name] for rank in ranks[:ep_size]])
            assert len(together[name]) == EXPERTS
            held = (ranks[i % ep_size][name] for i in range(len(ranks)))
        else:
            together[name] = t
            held = (t for _ in ranks)
        assert all(torch.equal(rank[name], value) for rank, value in zip(ranks, held, strict=True)), (
            f"replicas of {name} differ"
        )
    return together


def reshard(layouts: Sequence[Layout] | None = None, dense: str = "replicated") -> dict[str, int]:
    """layouts: all pairs of them. None: those of `dense`: EP 1, 2, 4, 8 on as many ranks, or (all) every way of keeping
    dense weights."""
    layouts = layouts or {"replicated": EP, "all": ALL}[dense]
    pairs = equal = 0
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(i) for i in range(len(layouts))]
        paths, written = [folder / "checkpoints" / LAST for folder in folders], []
        for layout, folder in zip(progress(layouts, "writing"), folders, strict=True):
            written.append(whole(run_ranks(write_whole, layout.ranks, folder, layout), layout.ep_size))
        for layout, folder in zip(progress(layouts, "reading"), folders, strict=True):
            ranks = run_ranks(read_all, layout.ranks, folder / "read", paths, layout)
            for i, expected in enumerate(written):
                pairs += 1
                equal += same(whole([found[i] for found in ranks], layout.ep_size), expected)
    return {"pairs": pairs, "equal": equal}
