"""Checkpoints that do not depend on the number of ranks: one directory of safetensors and one JSON file.

Tensors are written by torch.distributed.checkpoint, every rank its own shards; DTensor exists at this boundary only,
to say which slice of an expert weight a rank holds. All that is no tensor (loops, schedulers, callbacks, data
position) is JSON. Nothing here can execute code when it is read. durable.py makes the directory whole or absent.

    <name>.ckpt/manifest.json                    step, size and hash of every file
                meta.json                        everything but tensors
                shard-*.safetensors              (or all.safetensors) model.<name>, optimizer_<i>.<name>.<state>,
                                                 rng.<generator>.<rank>
"""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.futures import Future
from torch.optim import Optimizer

from scmoe.parallel import durable
from scmoe.parallel.expert_parallel import expert_parameters
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.random_state import rng_states

META = "meta.json"
FULL = "all.safetensors"


def model_state(module: nn.Module, context: ParallelContext) -> dict[str, Tensor]:
    """The module's tensors by name, expert shards as DTensors; all share storage with the module, so that reading
    into them is loading. A tied weight is there once, under its first name."""
    shards = {name for name, _ in expert_parameters(module)}
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in module.named_parameters()}
    state = {name: t for name, t in module.state_dict().items() if name not in tied}
    return {name: _as_dtensor(t, context) if name in shards else t for name, t in state.items()}


def optimizer_state(module: nn.Module, optimizer: Optimizer, context: ParallelContext) -> dict[str, Any]:
    """{"state": {parameter name: {...}}, "param_groups": [...]}: names, where torch has positions."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    shards = {p for _, p in expert_parameters(module)}
    state = {
        names[p]: {k: _as_dtensor(v, context) if p in shards and _is_like(v, p) else v for k, v in values.items()}
        for p, values in optimizer.state.items()
    }
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


class Saving:
    """A checkpoint on its way to disk. Its tensors are those of the moment it was started, whatever training does
    since; it is in its place, whole, when `finish` has returned on every rank."""

    def __init__(
        self, path: Path, checkpoint: dict[str, Any], context: ParallelContext, background: bool, full: bool = False
    ) -> None:
        """Every rank must make it. background: return once the tensors are copied, and write in a thread. full: in the
        end rank 0 puts all shards together in one file, in its memory."""
        self.path, self.context, self.step, self.full = path, context, checkpoint["global_step"], full
        tensors, meta = _split(checkpoint, context)
        self.meta = json.dumps(_to_json(meta))
        token: list[Any] = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, group=context.checkpoint_group)
        self.partial = durable.partial_path(path, token[0])
        with _alike_on_every_rank(context):
            if context.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                durable.sweep(path.parent)
                self.partial.mkdir()
        self.writer = _ShardWriter(self.partial)
        save = dcp.async_save if background else dcp.save
        self.writing: Any = None
        with self._loudly():
            self.writing = save(tensors, storage_writer=self.writer, process_group=context.checkpoint_group)
        if not background:
            self.writing = None

    def is_written(self) -> bool:
        """Whether this rank has nothing left to write, so that `finish` will not wait for it."""
        return self.writing is None or self.writing.done()

    def finish(self) -> None:
        """Every rank must call it. Of what is written it reads nothing, unless it is put together in one file.
        OSError, on every rank: the disk is full or the like; older ones are whole."""
        with self._loudly():
            if self.writing is not None:
                self.writing.result()
        context = self.context
        shares: list[dict[str, Any]] | None = [{}] * context.world_size if context.rank == 0 else None
        dist.gather_object(self.writer.fingerprints, shares, group=context.checkpoint_group)
        with _alike_on_every_rank(context):
            if shares is not None:
                files = {name: fingerprint for share in shares for name, fingerprint in share.items()}
                if self.full:
                    _put_together(self.partial)
                    files = {FULL: durable.fingerprint(self.partial / FULL)}
                durable.write_durably(self.partial / META, self.meta)
                files[META] = durable.fingerprint(self.partial / META)
                durable.commit(self.partial, self.path, self.step, files)

    @contextmanager
    def _loudly(self) -> Iterator[None]:
        try:
            yield
        except dcp.CheckpointException as error:  # a BaseException, raised alike on every rank
            raise OSError(f"{self.path} could not be written; older checkpoints are as they were: {error}") from error


class _ShardWriter(HuggingFaceStorageWriter):
    """Makes this rank's shard durable and takes its fingerprint, both in the thread that writes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.fingerprints: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in written.wait()})
        self.fingerprints = {name: durable.fingerprint(self.folder / name) for name in names}
        return written


def read_whole(path: Path, start: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin so, experts of all ranks together, in one process and on the host."""
    reader = HuggingFaceStorageReader(str(path))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(start)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant
        dcp.load(whole, storage_reader=reader, no_dist=True)
    return whole


def write_whole(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """One durable file. OSError: the disk is full or the like."""
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    durable.sync(path)


def _put_together(folder: Path) -> None:
    """DCP's own way (`enable_consolidation`) takes floating-point tensors alone: no random states."""
    shards = list(folder.glob("*.safetensors"))
    write_whole(read_whole(folder), folder / FULL)
    for shard in shards:
        shard.unlink()


def _split(checkpoint: dict[str, Any], context: ParallelContext) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Lightning's checkpoint dictionary as named tensors and the rest."""
    tensors = {f"rng.{name}.{context.rank}": state for name, state in rng_states().items()}
    tensors.update({f"model.{name}": t for name, t in checkpoint["state_dict"].items()})
    meta = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
    if "optimizer_states" in checkpoint:
        meta["param_groups"] = [state["param_groups"] for state in checkpoint["optimizer_states"]]
        for i, state in enumerate(checkpoint["optimizer_states"]):
            for name, values in state["state"].items():
                tensors.update({f"optimizer_{i}.{name}.{k}": torch.as_tensor(v) for k, v in values.items()})
    return tensors, meta


@contextmanager
def _alike_on_every_rank(context: ParallelContext) -> Iterator[None]:
    """What rank 0 raises inside, every rank raises: none waits for one that has given up."""
    failure: list[Any] = [None]
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        failure = [error]
    dist.broadcast_object_list(failure, group=context.checkpoint_group)
    if failure[0] is not None:
        raise failure[0]


@torch.no_grad()
def load(path: Path, module: nn.Module, optimizers: Sequence[Optimizer], context: ParallelContext) -> dict[str, Any]:
    """Reads a checkpoint into the module and the optimizers, whatever number of ranks wrote it; returns the rest.

    The key "rng_states" is this rank's, where as many ranks wrote as read. ValueError: not a checkpoint, or another
    model's.
    """
    with _alike_on_every_rank(context):
        if context.rank == 0:
            durable.verify(path)
    meta = _from_json(json.loads((path / META).read_text()))
    stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {f"model.{name}": t for name, t in model_state(module, context).items()}
    _check_same_model(path, _shapes(wanted), _stored_shapes(stored))

    groups = meta.pop("param_groups", [])
    for i, (optimizer, saved_groups) in enumerate(zip(optimizers, groups, strict=False)):
        wanted.update(_allocate_state(f"optimizer_{i}", module, optimizer, stored, context))
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
    if sum(key.startswith("rng.host.") for key in stored) == context.world_size:
        names = [name for name in rng_states() if f"rng.{name}.{context.rank}" in stored]
        meta["rng_states"] = {name: torch.empty_like(rng_states()[name]) for name in names}
        wanted |= {f"rng.{name}.{context.rank}": state for name, state in meta["rng_states"].items()}
    dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), process_group=context.checkpoint_group)
    return meta


@torch.no_grad()
def load_model(path: Path, model: nn.Module, prefix: str = "") -> None:
    """Reads the weights alone into a whole model in one process, whatever number of ranks wrote them.

    prefix: the model's name in the LightningModule, with its dot. ValueError: broken, or another model's checkpoint.
    """
    own = {f"model.{prefix}{name}": p for name, p in model.named_parameters()}
    durable.verify(path)
    reader = HuggingFaceStorageReader(str(path))
    _check_same_model(path, _shapes(own), _stored_shapes(reader.read_metadata().state_dict_metadata))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant
        dcp.load({name: p.detach() for name, p in own.items()}, storage_reader=reader, no_dist=True)


def _allocate_state(
    prefix: str, module: nn.Module, optimizer: Optimizer, stored: dict[str, Any], context: ParallelContext
) -> dict[str, Tensor]:
    """Empty optimizer state of the stored names and types, put into the optimizer; dcp.load fills it in place."""
    shards = {p for _, p in expert_parameters(module)}
    steps_on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    wanted: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        start = f"{prefix}.{name}."
        for key in [k for k in stored if k.startswith(start)]:
            size, dtype = stored[key].size, stored[key].properties.dtype
            sharded = p in shards and size[1:] == p.shape[1:] and len(size) == p.dim()
            device = p.device if len(size) or steps_on_device else "cpu"
            value = torch.empty(p.shape if sharded else size, dtype=dtype, device=device)
            optimizer.state[p][key.removeprefix(start)] = value
            wanted[key] = _as_dtensor(value, context) if sharded else value
    return wanted


def _shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _stored_shapes(stored: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(entry.size) for name, entry in stored.items() if name.startswith("model.")}


def _check_same_model(path: Path, here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> None:
    differing = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
    if differing:
        k = differing[0]
        raise ValueError(
            f"{path} holds another model: {k} is {there.get(k, 'absent')} there and {here.get(k, 'absent')} here"
            f" ({len(differing)} such tensors)"
        )


def _as_dtensor(shard: Tensor, context: ParallelContext) -> Tensor:
    return DTensor.from_local(shard.detach(), context.mesh, [Replicate(), Shard(0)], run_check=False)


def _is_like(value: Any, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape


def _to_json(x: Any) -> Any:
    """Containers, numbers, strings and small tensors as JSON; TypeError for anything else."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, Tensor):
        return {"__tensor__": x.tolist(), "dtype": str(x.dtype).removeprefix("torch.")}
    if isinstance(x, (list, tuple)):
        return [_to_json(v) for v in x]
    if isinstance(x, dict):
        if all(isinstance(k, str) for k in x):
            return {k: _to_json(v) for k, v in x.items()}
        return {"__items__": [[_to_json(k), _to_json(v)] for k, v in x.items()]}
    if isinstance(x, Path):
        return str(x)
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(x).__name__}: {x!r:.80}")


def _from_json(x: Any) -> Any:
    if isinstance(x, list):
        return [_from_json(v) for v in x]
    if isinstance(x, dict):
        if "__tensor__" in x:
            dtype = getattr(torch, x["dtype"])
            assert isinstance(dtype, torch.dtype)
            return torch.tensor(x["__tensor__"], dtype=dtype)
        if "__items__" in x:
            return {_from_json(k): _from_json(v) for k, v in x["__items__"]}
        return {k: _from_json(v) for k, v in x.items()}
    return x
