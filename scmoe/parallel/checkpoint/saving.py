"""Writes checkpoints: every rank its own shards, while training waits or in parallel with it.

At most one checkpoint of a run is being written, and none is removed before its successor is
complete.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer

from scmoe.files import write_durably
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.durable import Fingerprint
from scmoe.parallel.checkpoint.loading import load_in_place
from scmoe.parallel.checkpoint.of_ranks import Reasons, contents
from scmoe.parallel.checkpoint.remote import Place, Upload
from scmoe.parallel.checkpoint.state import META, set_rng_states
from scmoe.parallel.checkpoint.together import (
    first_failure,
    in_background,
    same_error_on_all_ranks,
    together,
)
from scmoe.parallel.mesh import Mesh


class Draft:
    """A checkpoint that is written to a folder, which all ranks see.

    token: equal on all ranks, and of this save alone.
    """

    def __init__(self, path: Path, token: str) -> None:
        self.path = path
        self.folder = durable.partial_path(path, token)

    def begin(self, rank: int) -> None:
        if rank == 0:
            durable.make_folder(self.path.parent)
            durable.sweep(self.path.parent, self.path.name)
            self.folder.mkdir()

    def add(self, written: dict[str, Fingerprint]) -> dict[str, Fingerprint]:
        """Return the files that this rank has written. They are in their place already."""
        return written

    def has(self, name: str, size: int) -> bool:
        """Return whether a file of this size is there for this rank."""
        file = self.folder / name  # asked by its name: NFS may list a folder as it was
        return file.exists() and file.stat().st_size == size

    def commit(self, step: int, files: dict[str, Fingerprint], meta: str) -> None:
        """Make the checkpoint whole, and move it to its place."""
        write_durably(self.folder / META, meta)
        files = files | {META: durable.fingerprint(self.folder / META)}
        durable.commit(self.folder, self.path, step, files)

    def discard(self) -> None:
        """Remove the partial checkpoint, so that a full disk has space again."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Saving:
    """A checkpoint that is being written.

    It holds the tensors of the moment it was started, and it is complete and in its place once
    `finish` has returned on every rank.
    """

    def __init__(
        self,
        path: Place,
        checkpoint: dict[str, Any],
        module: nn.Module,
        mesh: Mesh,
        background: bool,
    ) -> None:
        """Copy the tensors and start to write them. Every rank must construct it.

        background: return once the tensors are copied, and write in a thread.
        """
        self.path = path
        self.mesh = mesh
        self.step = checkpoint["global_step"]
        tensors, self.meta = contents(checkpoint, module, mesh)
        token: list[Any] = [durable.new_token()]
        dist.broadcast_object_list(token, group=mesh.checkpoint_group)
        self.draft = Draft(path, token[0]) if isinstance(path, Path) else Upload(path, token[0])
        with self._all_or_nothing():
            with same_error_on_all_ranks(mesh):
                self.draft.begin(mesh.rank)
            self.writer = _ShardWriter(self.draft.folder)
            save = dcp.async_save if background else dcp.save
            writing = save(
                written_here(tensors, mesh),
                storage_writer=self.writer,
                # The lowest rank that has a tensor saves it. Copies may differ: running statistics,
                # or weights that a callback unfreezes, whose gradients DDP does not sum.
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                process_group=mesh.checkpoint_group,
            )
        self.writing: Any = writing if background else None
        self.adding: Any = in_background(self._add) if background else None

    def _add(self) -> None:
        """Give what this rank has written to the checkpoint."""
        if self.writing is not None:
            self.writing.result()
        self.files = self.draft.add(self.writer.fingerprints)

    def is_written(self) -> bool:
        """Return whether this rank has written its part, so that `finish` does not wait for it."""
        return self.adding is None or self.adding.done()

    def finish(self) -> None:
        """Move the complete checkpoint to its place. Every rank must call it.

        Raises OSError on every rank if, for example, the disk is full. Older checkpoints are then
        still complete.
        """
        with self._all_or_nothing():
            if self.writing is not None:
                self.writing.result()
            mesh = self.mesh
            # an upload may take longer than the timeout of a collective
            together(mesh, self._add if self.adding is None else self.adding.result)
            shares: list[dict[str, Any]] | None = [{}] * mesh.world_size if mesh.rank == 0 else None
            dist.gather_object(self.files, shares, group=mesh.checkpoint_group)
            together(mesh, lambda: None if shares is None else self._seal(shares))

    def _seal(self, shares: Sequence[dict[str, Fingerprint]]) -> None:
        """Complete the checkpoint, on rank 0. shares: fingerprints of the files of each rank."""
        files = {name: fingerprint for share in shares for name, fingerprint in share.items()}
        for rank, share in enumerate(shares):
            for name, fingerprint in share.items():
                if not self.draft.has(name, fingerprint["bytes"]):
                    raise OSError(
                        f"{self.path} could not be written: {name}, written by rank {rank}, is not"
                        " there for rank 0; the folder must be on storage that all nodes share"
                    )
        self.draft.commit(self.step, files, self.meta)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Leave nothing behind an error, which every rank raises."""
        try:
            yield
        except dcp.CheckpointException as error:  # a BaseException
            self.draft.discard()
            what = f"{self.path} could not be written; older checkpoints are unchanged"
            raise OSError(f"{what}: {first_failure(error)}") from None
        except Exception:
            self.draft.discard()
            raise


def written_here(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Return the tensors that this rank writes, or a slice of them: of what is whole on several
    ranks, those that no lower rank has.

    Every rank must call it. Without it each rank would copy all of them to its host before
    `async_save` leaves them to the lowest one.
    """
    whole = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
    of_ranks: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(of_ranks, whole, group=mesh.control_group)
    of_lower = {name for names in of_ranks[: mesh.rank] for name in names}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, DTensor) or name not in of_lower
    }


class Checkpoints:
    """Saves, loads and removes a run's checkpoints; all ranks make the same calls.

    background: as in `Saving`.
    """

    def __init__(self, mesh: Mesh, background: bool) -> None:
        self.mesh, self.background = mesh, background
        self.saving: Saving | None = None
        # to be saved once the step is taken; whether weights only
        self.postponed: dict[Place, bool] = {}
        # called on every rank once this path is complete
        self.when_saved: dict[Place, Callable[[], None]] = {}
        # the save that the last `is_writing` of all ranks was about
        self.asked_about: Saving | None = None
        self.outdated: list[Place] = []  # removed once the save that replaces them is complete
        self.rng_states: dict[str, Tensor] | None = None  # loaded and not yet restored

    def __reduce__(self) -> Any:
        """Return how to make a copy: no save is running in it."""
        return Checkpoints, (self.mesh, self.background)

    def save(self, path: Place, state: dict[str, Any], module: nn.Module) -> None:
        """Start a save, or make it at once. state: Lightning's checkpoint dictionary."""
        self.finish()
        self.saving = Saving(path, state, module, self.mesh, self.background)
        if not self.background:
            self.finish()

    def check(self, state: dict[str, Any], module: nn.Module) -> None:
        """Raise on every rank what `save` would raise for something that cannot be saved.

        Nothing is written.
        """
        contents(state, module, self.mesh)

    def is_writing(self) -> bool:
        """Return whether this rank still writes its part of a checkpoint."""
        return self.saving is not None and not self.saving.is_written()

    def is_coming(self, path: Place) -> bool:
        """Return whether a checkpoint at this path has been requested and is not complete."""
        return path in self.postponed or (self.saving is not None and self.saving.path == path)

    def finish_unless(self, still_writing: bool) -> None:
        """Complete the save if no rank was writing it when all ranks were last asked."""
        if self.saving is not None and self.saving is self.asked_about and not still_writing:
            self.finish()
        self.asked_about = self.saving

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete.

        Then remove the outdated ones.
        """
        if self.saving is not None:
            saving, self.saving = self.saving, None
            when_saved = self.when_saved.pop(saving.path, None)
            saving.finish()
            if when_saved is not None:
                when_saved()
            outdated, self.outdated = self.outdated, []
            for path in outdated:
                if path not in self.postponed:
                    self.remove(path)

    def remove(self, path: Place) -> None:
        self.postponed.pop(path, None)
        if self.saving is not None or self.postponed:
            self.outdated.append(path)
        elif self.mesh.rank == 0:
            if isinstance(path, Path):
                durable.remove(path)
            else:
                path.remove()

    def load(
        self, path: Path, module: nn.Module, optimizers: Sequence[Optimizer], strict: bool
    ) -> tuple[dict[str, Any], Reasons]:
        """Read tensors into the module and the optimizers. Return the rest, and why it lacks
        entries.

        No save may be running. ValueError: see `load_in_place`.
        """
        assert self.saving is None
        state, reasons = load_in_place(path, module, optimizers, self.mesh, strict)
        self.rng_states = state.pop("rng_states", None)
        return state, reasons

    def restore_random_state(self) -> None:
        """Set this rank's random generators to the loaded states.

        Only the first call after `load` does anything.
        """
        if self.rng_states is not None:
            set_rng_states(self.rng_states)
            self.rng_states = None


class _ShardWriter(HuggingFaceStorageWriter):
    """Makes this rank's shard durable and computes its fingerprint.

    Both happen in the thread that writes it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        # Tensors are on the host already. Else torch would wait here for the stream of training.
        self.per_thread_copy_ahead = 0
        self.folder = folder
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.fingerprints: dict[str, Fingerprint] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # a new thread begins on device 0, where its rank would allocate a CUDA context
        if self.device is not None:
            torch.cuda.set_device(self.device)
        written = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in written.wait()})
        self.fingerprints = {name: durable.fingerprint(self.folder / name) for name in names}
        return written
