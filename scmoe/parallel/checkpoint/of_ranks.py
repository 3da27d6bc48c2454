"""Saves what ranks may have differently, so that each rank gets its own back, and no rank that of
another one.

Parameters, buffers and moments are saved by the lowest rank that has them, or a DTensor says which
part of them a rank has. Everything else is of users' code and may differ: the state of callbacks,
what `on_save_checkpoint` adds, extra state, odd state of optimizers. Ranks compare a digest of each
such entry. meta.json has rank 0's, and under OF_RANKS the others' where entries differ. Ranks in
the same layout as the writers get their own. In another layout numbers are rank 0's, as in
checkpoints of other strategies. An entry with larger tensors, which may be of one rank's experts,
is left out, and the reason is returned.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe.parallel.checkpoint.state import (
    MODULE,
    OPTIMIZER,
    Encoded,
    Stored,
    check_types,
    each_in_its_own_storage,
    from_json,
    split,
    to_json,
)
from scmoe.parallel.checkpoint.together import same_error_on_all_ranks
from scmoe.parallel.mesh import Mesh

OF_RANKS = "of_ranks"  # key of meta.json
BY_NAME = ("callbacks", MODULE, OPTIMIZER)  # keys of meta.json whose values are compared one by one
TITLES = {
    "callbacks": "the state of the callback",
    MODULE: "the entry of state_dict",
    OPTIMIZER: "optimizer state",
}

Key = tuple[Any, ...]  # of an entry: its keys in meta.json, from the outermost one on
Reasons = dict[Key, str]  # why an entry cannot be read


def contents(
    checkpoint: dict[str, Any], module: nn.Module, mesh: Mesh
) -> tuple[dict[str, Tensor], str]:
    """Return this rank's tensors of a checkpoint, and the text of its meta.json.

    Every rank must call it.

    Ranks ask each other in the control group, because a thread may use the checkpoint group for an
    earlier checkpoint. TypeError, ValueError, on every rank: it has something that cannot be saved;
    the message names it.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[Key, _Entry] = {}
    group = mesh.control_group
    with same_error_on_all_ranks(mesh, group):
        tensors, meta = split(checkpoint, module, mesh)
        entries = {key: _Entry(key, value) for key, value in _entries_of(meta)}
        check_types(tensors)
    of_ranks: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(
        of_ranks, {key: entry.digest for key, entry in entries.items()}, group=group
    )
    keys = dict.fromkeys(key for digests in of_ranks for key in digests)
    differing = [key for key in keys if len({digests.get(key) for digests in of_ranks}) > 1]
    for key in differing:
        if key in entries:
            entries[key].is_of(mesh.rank)
    for key in entries.keys() - set(differing):
        is_tensor = isinstance(entries[key].value, Tensor)
        if key[0] == MODULE and is_tensor:  # readers of weights look for it under this name
            tensors[f"model.{key[1]}"] = entries.pop(key).value
    for entry in entries.values():
        tensors.update(entry.tensors)
    others: list[Any] = [None] * mesh.world_size
    differing_here = {key: entries[key].json for key in differing if key in entries}
    dist.all_gather_object(others, differing_here if mesh.rank else {}, group=group)
    return dict(each_in_its_own_storage(tensors)), _text(entries, differing, others, mesh)


def _text(entries: dict[Key, "_Entry"], differing: list[Key], others: list[Any], mesh: Mesh) -> str:
    meta: dict[Any, Any] = {}
    for key, entry in entries.items():
        inner = meta.setdefault(key[0], {}) if len(key) > 1 else meta
        inner[key[-1]] = Encoded(entry.json)
    if differing:
        ranks = [
            {rank: Encoded(values[key]) for rank, values in enumerate(others) if key in values}
            for key in differing
        ]
        meta[OF_RANKS] = {"layout": layout(mesh), "keys": differing, "ranks": ranks}
    return json.dumps(to_json(meta, _refuse))


class _Entry:
    """One entry as JSON, its large tensors by their names, and a digest of all.

    TypeError: it cannot be saved.
    """

    def __init__(self, key: Key, value: Any) -> None:
        self.key, self.value = key, value
        self._encode("")
        digest = hashlib.sha256(json.dumps(self.json, sort_keys=True).encode())
        for tensor in self.tensors.values():
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
        self.digest = digest.hexdigest()

    def is_of(self, rank: int) -> None:
        """Name the tensors for this rank alone."""
        self._encode(f".rank{rank}")

    def _encode(self, suffix: str) -> None:
        self.tensors: dict[str, Tensor] = {}

        def store(tensor: Tensor) -> str:
            name = f"rest.{'.'.join(map(str, self.key))}.{len(self.tensors)}{suffix}"
            self.tensors[name] = tensor.detach()
            return name

        try:
            self.json = to_json(self.value, store)
            json.loads(json.dumps(self.json), object_hook=from_json)
            check_types(self.tensors)
        except TypeError as error:
            raise TypeError(
                f"{title(self.key)} cannot be saved: {error}. Convert it, or leave it out"
            ) from error


def _bytes_of(tensor: Tensor) -> Any:
    flat = tensor.cpu().resolve_conj().contiguous().reshape(-1)
    return (torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).numpy()


def _refuse(tensor: Tensor) -> str:
    raise AssertionError("every entry is encoded already")


def _entries_of(meta: Mapping[Any, Any]) -> Iterator[tuple[Key, Any]]:
    for key, value in meta.items():
        if key in BY_NAME and isinstance(value, dict) and value:
            yield from (((key, name), inner) for name, inner in value.items())
        else:
            yield (key,), value


def title(key: Key) -> str:
    """Return an entry's name in messages."""
    return f"{TITLES[key[0]]} {key[1]}" if len(key) > 1 else f"checkpoint[{key[0]!r}]"


def layout(mesh: Mesh) -> list[int]:
    """Return what must be equal for ranks to hold the same parts.

    It is the number of ranks, EP, and the axes of split dense weights.
    """
    return [mesh.world_size, mesh.ep_size, 0 if mesh.dense_mesh is None else mesh.dense_mesh.ndim]


def rank_meta(meta: dict[str, Any], mesh: Mesh) -> tuple[dict[str, Any], Reasons]:
    """Return what meta.json holds for this rank in this layout, and why it lacks other entries."""
    differ = meta.pop(OF_RANKS, {"layout": [], "keys": [], "ranks": []})
    same_layout = differ["layout"] == layout(mesh)
    reasons: Reasons = {}
    for key, of_ranks in zip(differ["keys"], differ["ranks"], strict=True):
        *outer, name = key
        inner = meta.setdefault(outer[0], {}) if outer else meta
        values = dict(of_ranks)
        if name in inner:
            values[0] = inner.pop(name)
        if same_layout and mesh.rank in values:
            inner[name] = values[mesh.rank]
        elif not same_layout and any(has_tensors(value) for value in values.values()):
            reasons[tuple(key)] = (
                f"{title(key)} differs between the ranks that saved it and holds tensors, so it can"
                f" be read only by ranks in the same layout: {differ['layout'][0]} ranks, ep_size"
                f" {differ['layout'][1]} and the same strategy.dense. Use this layout, or leave out"
                " what reads it"
            )
        elif not same_layout and 0 in values:
            inner[name] = values[0]
    return meta, reasons


def reasons_under(reasons: Reasons, outer: str) -> list[str]:
    """Return why entries cannot be read whose outermost key is this one."""
    return [reason for key, reason in reasons.items() if key[0] == outer]


def has_tensors(x: Any) -> bool:
    """Return whether a value of meta.json holds a tensor of more than one element."""
    if isinstance(x, dict):
        return any(has_tensors(value) for value in x.values())
    if isinstance(x, (list, tuple)):
        return any(has_tensors(value) for value in x)
    return isinstance(x, Stored) or (isinstance(x, Tensor) and x.numel() > 1)


def replaced(x: Any, replace: Callable[[Any], Any]) -> Any:
    """Return a value of meta.json with `replace` called for everything that is no container.

    The calls are in the order of the value.
    """
    if isinstance(x, dict):
        return {key: replaced(value, replace) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(replaced(value, replace) for value in x)
    return replace(x)


def stored_in(x: Any) -> list[str]:
    """Return the names of all tensors of a value that are stored elsewhere."""
    names: list[str] = []
    replaced(x, lambda leaf: names.append(leaf.name) if isinstance(leaf, Stored) else None)
    return names


def with_tensors(x: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value with its stored tensors in their places."""
    return replaced(x, lambda leaf: tensors[leaf.name] if isinstance(leaf, Stored) else leaf)
