"""Writes a checkpoint: every rank its own shards, while training waits or in parallel with it."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import read_whole
from scmoe.parallel.checkpoint.state import FULL, META, split, to_json
from scmoe.parallel.mesh import ParallelContext


class Saving:
    """A checkpoint that is being written. It holds the tensors of the moment it was started, and it is complete and in
    its place once `finish` has returned on every rank."""

    def __init__(
        self, path: Path, checkpoint: dict[str, Any], context: ParallelContext, background: bool, full: bool = False
    ) -> None:
        """Every rank must construct it. background: return once the tensors are copied, and write in a thread. full: in
        the end rank 0 merges all shards into one file, in its memory."""
        self.path, self.context, self.step, self.full = path, context, checkpoint["global_step"], full
        tensors, meta = split(checkpoint, context)
        self.meta = json.dumps(to_json(meta))
        token: list[Any] = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, group=context.checkpoint_group)
        self.partial = durable.partial_path(path, token[0])
        with context.same_error_on_all_ranks():
            if context.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                durable.sweep(path.parent)
                self.partial.mkdir()
        self.writer = _ShardWriter(self.partial)
        save = dcp.async_save if background else dcp.save
        with self._loudly():
            writing = save(tensors, storage_writer=self.writer, process_group=context.checkpoint_group)
        self.writing: Any = writing if background else None

    def is_written(self) -> bool:
        """Return whether this rank has written its part, so that `finish` does not wait for it."""
        return self.writing is None or self.writing.done()

    def finish(self) -> None:
        """Move the complete checkpoint to its place; every rank must call it. It reads shards again only to merge them.

        OSError, on every rank: for example, the disk is full; older checkpoints are still complete.
        """
        with self._loudly():
            if self.writing is not None:
                self.writing.result()
        context = self.context
        shares: list[dict[str, Any]] | None = [{}] * context.world_size if context.rank == 0 else None
        dist.gather_object(self.writer.fingerprints, shares, group=context.checkpoint_group)
        with context.same_error_on_all_ranks():
            if shares is not None:
                files = {name: fingerprint for share in shares for name, fingerprint in share.items()}
                if self.full:
                    _merge(self.partial)
                    files = {FULL: durable.fingerprint(self.partial / FULL)}
                durable.write_durably(self.partial / META, self.meta)
                files[META] = durable.fingerprint(self.partial / META)
                durable.commit(self.partial, self.path, self.step, files)

    @contextmanager
    def _loudly(self) -> Iterator[None]:
        try:
            yield
        except dcp.CheckpointException as error:  # a BaseException, raised on every rank
            raise OSError(f"{self.path} could not be written; older checkpoints are unchanged: {error}") from error


class _ShardWriter(HuggingFaceStorageWriter):
    """Makes this rank's shard durable and computes its fingerprint, both in the thread that writes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.fingerprints: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in written.wait()})
        self.fingerprints = {name: durable.fingerprint(self.folder / name) for name in names}
        return written


def write_whole(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Write one durable file. OSError: for example, the disk is full."""
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    durable.sync(path)


def _merge(folder: Path) -> None:
    """Merge the shards into one file. DCP's own `enable_consolidation` accepts no integers, such as random states."""
    shards = list(folder.glob("*.safetensors"))
    write_whole(read_whole(folder), folder / FULL)
    for shard in shards:
        shard.unlink()
