"""A run is interrupted at a step and resumed: it must end bit-identical to the run that was not."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scmoe.experiments.engine.ranks import run_ranks
from scmoe.experiments.faults.tiny_run import WAYS, fit, progress, same, spread, tensors, tiny

RESUME_STEPS = 6


def run(
    rank: int, world_size: int, workers: int, dense: str, folder: Path, resume_from: list[Path]
) -> list[dict[str, Any]]:
    """Return how a run ends, or runs that resume from checkpoints: tensors, learning rate, position in the data.

    They validate after every step, which restarts data loaders in between.
    """
    config = tiny(
        world_size,
        *("trainer.accumulate=2", f"trainer.max_steps={RESUME_STEPS}", "trainer.checkpoint_every=1"),
        *(f"data.workers={workers}", f"strategy.ep_size={world_size}"),
        *("trainer.val_every=1", "data.val_sequences=16", *WAYS[dense]),
    )
    ends = []
    for i, path in enumerate(resume_from or [None]):
        trainer = fit(config, folder / str(i), path)
        lr = torch.tensor(trainer.optimizers[0].param_groups[0]["lr"], dtype=torch.float64)
        consumed = torch.tensor(trainer.datamodule.consumed_samples)
        ends.append({**tensors(trainer), "lr": lr, "consumed": consumed})
    return ends


def resume(
    steps: int | None = None, worlds: Sequence[int] = (1, 2), workers: Sequence[int] = (0, 2), dense: str = "replicated"
) -> dict[str, int]:
    """steps: the number of steps to resume from, None: all. dense: where dense weights are."""
    compared = bit_equal = 0
    for world_size, loaders in progress([(w, n) for w in worlds for n in workers], "resuming"):
        with tempfile.TemporaryDirectory() as name:
            straight = run_ranks(run, world_size, loaders, dense, Path(name) / "straight", [])
            saved = [Path(name) / "straight/0/checkpoints" / f"step={i}.ckpt" for i in range(1, RESUME_STEPS)]
            saved = spread(saved, steps)
            resumed = run_ranks(run, world_size, loaders, dense, Path(name) / "resumed", saved)
        compared += len(saved)
        for i in range(len(saved)):
            bit_equal += all(same(ends[i], end) for ends, (end,) in zip(resumed, straight, strict=True))
    return {"compared": compared, "bit_equal": bit_equal}
