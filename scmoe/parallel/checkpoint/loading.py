"""Reads a checkpoint; any number of ranks may have written it."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.of_ranks import (
    Reasons,
    has_tensors,
    rank_meta,
    reasons_under,
    replaced,
    stored_in,
    with_tensors,
)
from scmoe.parallel.checkpoint.remote import downloaded, located
from scmoe.parallel.checkpoint.state import (
    META,
    MODULE,
    OPTIMIZER,
    Stored,
    as_dtensor,
    from_json,
    kept_in,
    parameter_names,
    rng_states,
    tied_weights,
    with_dtensors,
)
from scmoe.parallel.checkpoint.together import reading, together
from scmoe.parallel.mesh import Mesh, expert_parameters

# what the names of the network's weights begin with: the LightningModule's, and its `model`
NETWORK_PREFIX = "model.model."


def read_whole(path: Path, start: str = "") -> dict[str, Tensor]:
    """Return the tensors whose names begin with `start`, on the CPU of one process.

    They have the experts of all ranks.
    """
    return read_named(path, [name for name in tensors_of(path) if name.startswith(start)])


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name, on the meta device.

    They have shapes and types; nothing is read.
    """
    stored: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in stored.items()
    }


def read_named(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return these tensors of a checkpoint, on the CPU of one process.

    They have the experts of all ranks.
    """
    there = tensors_of(path)
    whole = {name: torch.empty_like(there[name], device="cpu") for name in names}
    _fill(whole, path)
    return whole


def read_meta(path: Path) -> dict[str, Any]:
    """Return everything in a checkpoint except its tensors, as `of_ranks.contents` has written it.

    Raises BrokenCheckpoint where the file is damaged.
    """
    # a save to a remote storage has put something before its name
    file = next(path.glob(f"*{META}"), path / META)
    try:
        return json.loads(file.read_text(encoding="utf-8"), object_hook=from_json)
    except ValueError as error:
        raise durable.BrokenCheckpoint(f"{file} is damaged: {error}") from error


def load_checkpoint(path: Any) -> dict[str, Any]:
    """Return a checkpoint as Lightning keeps it in one file, with all experts, on the CPU of one
    process: `state_dict`, hyper-parameters, and what callbacks and hooks have added.

    path: a folder, also on a storage that fsspec reaches. The optimizers' state is left out, and so
    is, with a warning, what several ranks have saved differently. ValueError: no whole checkpoint.
    """
    with downloaded(located(path)) as folder:
        durable.verify(folder)
        meta, reasons = rank_meta(read_meta(folder), Mesh())
        for name in ("param_groups", OPTIMIZER):
            meta.pop(name, None)
        meta = with_tensors(meta, read_named(folder, stored_in(meta)))
        tensors = read_whole(folder, "model.")
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    weights |= meta.pop(MODULE, {})
    for key, reason in reasons.items():
        if key[0] != OPTIMIZER:
            warnings.warn(f"not loaded: {reason}", stacklevel=2)
    weights |= {
        name: weights[first]
        for name, first in meta.pop("tied_weights", {}).items()
        if first in weights
    }
    meta["state_dict"] = weights
    return meta


def _fill(tensors: dict[str, Tensor], path: Path) -> None:
    """Read into these tensors in one process."""
    with reading(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


@torch.no_grad()
def load_in_place(
    path: Path, module: nn.Module, optimizers: Sequence[Optimizer], mesh: Mesh, strict: bool = True
) -> tuple[dict[str, Any], Reasons]:
    """Read a checkpoint into the module and the optimizers. Return the rest, and why it lacks
    entries.

    strict: checkpoint and module must have the same entries; if False, entries that only one has
    are skipped. Each rank verifies its share of the files. The key "rng_states" holds this rank's
    states, if as many ranks wrote as read. ValueError: no whole checkpoint, or another model's. The
    checkpoint's state replaces all earlier state of an optimizer.
    """
    together(mesh, lambda: durable.verify(path, slice(mesh.rank, None, mesh.world_size)))
    meta, reasons = rank_meta(read_meta(path), mesh)
    stored = tensors_of(path)
    if strict and (unread := reasons_under(reasons, MODULE)):
        raise ValueError(f"{path}: {unread[0]}, or set strict_loading=False to leave it as it is")
    entries = meta.pop(MODULE, {})
    state = module.state_dict()
    wanted = _of_module(path, module, state, entries, stored, mesh, strict)
    groups, further = meta.pop("param_groups", []), meta.pop(OPTIMIZER, {})
    if optimizers and groups:
        check_same_groups(path, [optimizer.param_groups for optimizer in optimizers], groups)
        if unread := reasons_under(reasons, OPTIMIZER):
            raise ValueError(f"{path}: {unread[0]}")
        if mesh.ep_size > 1:
            check_state_of_experts(path, module, further)
    for i, (optimizer, saved_groups) in enumerate(zip(optimizers, groups, strict=False)):
        optimizer.state.clear()
        wanted.update(_allocate_state(f"optimizer_{i}", module, optimizer, stored, mesh))
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
    if sum(key.startswith("rng.host.") for key in stored) == mesh.world_size:
        names = [name for name in rng_states() if f"rng.{name}.{mesh.rank}" in stored]
        meta["rng_states"] = {name: torch.empty_like(rng_states()[name]) for name in names}
        wanted |= {f"rng.{name}.{mesh.rank}": state for name, state in meta["rng_states"].items()}
    others = {name: _allocated(stored[name]) for name in stored_in([entries, further, meta])}
    wanted |= others
    with reading(path):
        dcp.load(
            wanted,
            storage_reader=HuggingFaceStorageReader(str(path)),
            process_group=mesh.checkpoint_group,
        )
    _give(module, state, wanted, with_tensors(entries, others))
    if groups:
        _put_further_state(module, optimizers, with_tensors(further, others))
    rest = {key: why for key, why in reasons.items() if key[0] not in (MODULE, OPTIMIZER)}
    return with_tensors(meta, others), rest


def _of_module(
    path: Path,
    module: nn.Module,
    state: Mapping[str, Any],
    entries: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    mesh: Mesh,
    strict: bool,
) -> dict[str, Tensor]:
    """Return the tensors for those entries of the state_dict that a checkpoint has as tensors.

    Those of parameters and buffers are the module's own; others are new. entries: which it has in
    meta.json.

    ValueError: the module and the checkpoint have other entries, and `strict`.
    """
    is_kept, tied = kept_in(module), tied_weights(module)
    wanted: dict[str, Tensor] = {}
    for name, x in with_dtensors(state, module, mesh).items():
        key = f"model.{name}"
        if name in tied or name in entries:
            continue
        if key in stored:
            wanted[key] = x if is_kept(x) else _allocated(stored[key])
        elif isinstance(x, Tensor) and strict:
            wanted[key] = x
        elif strict:
            raise ValueError(f"{path} holds another model: {name} is absent there")
    there = {name: tuple(t.shape) for name, t in stored.items() if name.startswith("model.")}
    check_same_model(path, wanted, there if strict else {name: there[name] for name in wanted})
    if strict and (unknown := sorted(entries.keys() - state.keys())):
        raise ValueError(f"{path} holds another model: {unknown[0]} is absent here")
    return wanted


def _allocated(like: Tensor) -> Tensor:
    return torch.empty_like(like, device="cpu")


def _give(
    module: nn.Module, state: dict[str, Any], read: Mapping[str, Tensor], entries: Mapping[str, Any]
) -> None:
    """Call `load_state_dict` with what was read.

    So hooks and overrides of modules get it, as in other strategies. state: the module's; tensors
    of parameters and buffers hold already what was read.
    """
    tied, is_kept = tied_weights(module), kept_in(module)
    for name, x in [*state.items()]:
        key = f"model.{tied.get(name, name)}"
        if name in entries:
            state[name] = entries[name]
        elif key not in read:
            del state[name]  # the checkpoint does not have it
        elif not is_kept(x) and not isinstance(read[key], DTensor):
            state[name] = read[key]
    module.load_state_dict(state, strict=False)


def _put_further_state(
    module: nn.Module, optimizers: Sequence[Optimizer], further: Mapping[str, Any]
) -> None:
    """Put state into optimizers that is not like its weight.

    further: by the optimizer's number and a name.
    """
    for key, values in further.items():
        number, _, name = key.partition(".")
        if int(number) < len(optimizers):
            optimizer = optimizers[int(number)]
            states: dict[Any, Any] = optimizer.state
            parameters = {name: p for p, name in parameter_names(module, optimizer).items()}
            if name not in parameters:
                states[name] = values
            else:
                parameter = parameters[name]
                states[parameter].update(replaced(values, partial(_moved, optimizer, parameter)))


def _moved(optimizer: Optimizer, parameter: Tensor, leaf: Any) -> Any:
    """Return a tensor on the device of a parameter's state, anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(_device_of_state(optimizer, parameter, leaf.shape))


def _device_of_state(optimizer: Optimizer, parameter: Tensor, size: torch.Size) -> torch.device:
    """Return where an optimizer keeps state of a parameter: a single number on the host, unless a
    kernel reads it."""
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return parameter.device if len(size) or on_device else torch.device("cpu")


def check_same_groups(path: Path, here: Sequence[Any], there: Sequence[Any]) -> None:
    """Raise ValueError for other optimizers, or other numbers of parameter groups."""
    if len(here) != len(there):
        raise ValueError(
            f"{path} is of a training with {len(there)} optimizers, and configure_optimizers made"
            f" {len(here)}. Make as many as there, or load only the weights"
        )
    for i, (groups, saved_groups) in enumerate(zip(here, there, strict=True)):
        if len(groups) != len(saved_groups):
            firsts = ", ".join(
                str(next(iter(group["params"]), "no weight")) for group in saved_groups
            )
            raise ValueError(
                f"{path} has {len(saved_groups)} parameter groups of optimizer {i}, which begin"
                f" with {firsts}; here it has {len(groups)}. Make the same groups in"
                " configure_optimizers, or load only the weights"
            )


def check_state_of_experts(path: Path, module: nn.Module, further: Mapping[str, Any]) -> None:
    """Raise ValueError for state of all experts that is not like the weights: this rank's part of
    it is not known.

    further: state of optimizers by number and name. Where a rank held a part of the experts, a
    save has refused such state.
    """
    experts = {name for name, _ in expert_parameters(module)}
    for key, values in further.items():
        number, _, name = key.partition(".")
        if name not in experts or not isinstance(values, dict):
            continue
        for odd, value in values.items():
            if isinstance(value, (Tensor, Stored)) and has_tensors(value):
                raise ValueError(
                    f"{path}: optimizer {number} keeps {odd} of all experts of {name}, which is"
                    " not of the weight's shape, so it cannot be divided among ranks. Resume with"
                    " ep_size=1, or load only the weights"
                )


def network_in(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the network's weights by their names in the model, on the meta device.

    Nothing is read. model: may be on the meta device. ValueError: a broken checkpoint, or another
    model's.
    """
    durable.verify(path)
    weights = {
        name.removeprefix(NETWORK_PREFIX): t
        for name, t in tensors_of(path).items()
        if name.startswith(NETWORK_PREFIX)
    }
    check_same_model(
        path, dict(model.named_parameters()), {name: tuple(t.shape) for name, t in weights.items()}
    )
    return weights


@torch.no_grad()
def load_model(path: Path, model: nn.Module) -> None:
    """Read only the weights, into a whole model in one process. ValueError: as `network_in`."""
    network_in(path, model)
    weights = {NETWORK_PREFIX + name: p.detach() for name, p in model.named_parameters()}
    _fill(weights, path)


def weights_by_name(path: Path, model: nn.Module) -> Callable[[str], Tensor]:
    """Return a function that reads one parameter by its name in the model.

    ValueError: as `network_in`.
    """
    network_in(path, model)
    parameters = dict(model.named_parameters())

    def read(name: str) -> Tensor:
        value = torch.empty_like(parameters[name], device="cpu", requires_grad=False)
        _fill({NETWORK_PREFIX + name: value}, path)
        return value

    return read


def _allocate_state(
    prefix: str, module: nn.Module, optimizer: Optimizer, stored: Mapping[str, Tensor], mesh: Mesh
) -> dict[str, Tensor]:
    """Put empty state of the stored names into the optimizer, and return it.

    `dcp.load` fills it in place.
    """
    shards = {p for _, p in expert_parameters(module)}
    wanted: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        start = f"{prefix}.{name}."
        for key in [k for k in stored if k.startswith(start)]:
            size, dtype = stored[key].shape, stored[key].dtype
            device = _device_of_state(optimizer, p, size)
            like = size == p.shape or (
                p in shards and len(size) == p.dim() and size[1:] == p.shape[1:]
            )
            weight = stored.get(f"model.{name}")
            if like and weight is not None and dtype == weight.dtype:
                # moments have the type of their weight, which may be another one now
                dtype = p.dtype
            value = (
                torch.empty_like(p, dtype=dtype)
                if like
                else torch.empty(size, dtype=dtype, device=device)
            )
            optimizer.state[p][key.removeprefix(start)] = value
            wanted[key] = as_dtensor(value, mesh) if like and p in shards else value
    return wanted


def check_same_model(
    path: Path, tensors: Mapping[str, Tensor], there: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError if the tensors here have other names or shapes than those of a file.

    path: of the file. there: its shapes by name.
    """
    here = {name: tuple(t.shape) for name, t in tensors.items()}
    if differing := sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k)):
        k = differing[0]
        raise ValueError(
            f"{path} holds another model: {k} is {there.get(k, 'absent')} there and"
            f" {here.get(k, 'absent')} here ({len(differing)} such tensors)"
        )
