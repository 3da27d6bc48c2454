"""The checkpoints of one run: at most one is being written, and none is removed before its successor is complete."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_checkpoint
from scmoe.parallel.checkpoint.random_state import set_rng_states
from scmoe.parallel.checkpoint.saving import Saving
from scmoe.parallel.mesh import ParallelContext


class Checkpoints:
    """Saves, loads and removes a run's checkpoints. Every rank must make the same calls.

    background: `save` returns once the tensors are copied; the files are complete some steps later.
    full: rank 0 merges the shards of all ranks into one file.
    """

    def __init__(self, context: ParallelContext, background: bool, full: bool) -> None:
        self.context, self.background, self.full = context, background, full
        self.saving: Saving | None = None
        self.asked_about: Saving | None = None  # the save that the last `is_writing` of all ranks was about
        self.outdated: list[Path] = []  # removed once the save that replaces them is complete
        self.rng_states: dict[str, Tensor] | None = None  # loaded and not yet restored

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """state: Lightning's checkpoint dictionary."""
        self.finish()
        self.saving = Saving(path, state, self.context, self.background, self.full)
        if not self.background:
            self.finish()

    def is_writing(self) -> bool:
        """Return whether this rank still writes its part of a checkpoint."""
        return self.saving is not None and not self.saving.is_written()

    def finish_unless(self, still_writing: bool) -> None:
        """Complete the save if no rank was writing it when all ranks were last asked."""
        if self.saving is not None and self.saving is self.asked_about and not still_writing:
            self.finish()
        self.asked_about = self.saving

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete; then remove the outdated ones."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.finish()
            outdated, self.outdated = self.outdated, []
            for path in outdated:
                self.remove(path)

    def remove(self, path: Path) -> None:
        if self.saving is not None:
            self.outdated.append(path)
        elif self.context.rank == 0:
            durable.remove(path)

    def load(self, path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """Read tensors into the module and the optimizers and return the rest. ValueError: see `load_checkpoint`."""
        state = load_checkpoint(path, module, optimizers, self.context)
        self.rng_states = state.pop("rng_states", None)
        return state

    def restore_random_state(self) -> None:
        """Set this rank's random generators to the loaded states; only the first call after `load` does anything."""
        if self.rng_states is not None:
            set_rng_states(self.rng_states)
            self.rng_states = None
