"""Defines what a checkpoint holds: named tensors, random states among them, and JSON for everything
else.

    <name>.ckpt/manifest.json                step, size and hash of every file
                meta.json                    everything except tensors
                shard-*.safetensors          model.<name>, optimizer_<i>.<name>.<state>,
                                             rng.<generator>.<rank>, rest.<key>.<number>

A DTensor says which slice of a weight a rank holds. Nothing in these files can execute code
when it is read.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from scmoe.parallel.dense.sharded import local
from scmoe.parallel.mesh import Mesh, expert_parameters

META = "meta.json"
# By these keys `from_json` knows what is no JSON.
MARKS = {"__tensor__", "__stored__", "__tuple__", "__set__", "__items__"}
MODULE, OPTIMIZER = "module_entries", "optimizer_entries"  # keys of meta.json, see `split`
# what the names of an optimizer's parameters begin with that the module does not have
OUTSIDE_MODULE = "outside the module"
LARGEST_IN_JSON = 64  # elements of a tensor; larger ones are stored as tensors


@dataclass(frozen=True)
class Stored:
    """A tensor of meta.json that is in the files of tensors, under this name."""

    name: str


@dataclass(frozen=True)
class Encoded:
    """A value for which `to_json` has been called already."""

    json: Any


def model_state(module: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """Return the module's state_dict; tensors that are split over ranks are DTensors.

    Parameters and buffers share storage with the module. A tied weight occurs once, under its first
    name. Calling `state_dict` makes FSDP split again what it has gathered.
    """
    tied = tied_weights(module)
    return {
        name: x
        for name, x in with_dtensors(module.state_dict(), module, mesh).items()
        if name not in tied
    }


def with_dtensors(state: Mapping[str, Any], module: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """Return the entries of a state_dict, the experts' as DTensors in the same storage."""
    shards = {name for name, _ in expert_parameters(module)}
    return {
        name: as_dtensor(x, mesh) if name in shards and isinstance(x, Tensor) else x
        for name, x in state.items()
    }


def kept_in(module: nn.Module) -> Callable[[Any], bool]:
    """Return a function that says whether an entry of the state_dict is memory of the module.

    This is memory of a parameter or buffer, or a part of experts. Others are made by the call:
    extra state, copies of a hook, states of metrics.
    """
    kept = {_memory(t) for t in (*module.parameters(), *module.buffers())}

    def is_kept(x: Any) -> bool:
        return isinstance(x, DTensor) or (isinstance(x, Tensor) and _memory(x) in kept)

    return is_kept


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    part = local(tensor)
    try:
        return part.device, part.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        # some subclasses of Tensor have no storage; `check_types` refuses them by name
        return part.device, 0


def own_part(module: nn.Module, state: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Return what this rank writes of `model_state`.

    Buffers, such as running statistics, may differ from rank to rank. Rank 0's are written, as DDP
    sends these to all ranks before each forward; else a checkpoint would mix those of several
    ranks.
    """
    if mesh.rank == 0:
        return state
    buffers = {name for name, _ in module.named_buffers()}
    return {name: x for name, x in state.items() if name not in buffers or isinstance(x, DTensor)}


def tied_weights(module: nn.Module) -> dict[str, str]:
    """Return the further names of tied weights, each with the weight's first name."""
    first = {p: name for name, p in module.named_parameters()}
    return {
        name: first[p]
        for name, p in module.named_parameters(remove_duplicate=False)
        if name != first[p]
    }


def optimizer_state(module: nn.Module, optimizer: Optimizer, mesh: Mesh) -> dict[str, Any]:
    """Return {"state": {parameter name: {...}}, "param_groups": [...]}.

    It has names in place of torch's positions. State that belongs to no parameter keeps its key.

    ValueError: state of experts that is neither of the weight's shape nor a number, so ranks' parts
    cannot be joined.
    """
    names = parameter_names(module, optimizer)
    shards = {p for _, p in expert_parameters(module)}
    for p in shards & optimizer.state.keys() if mesh.ep_size > 1 else ():
        for k, v in optimizer.state[p].items():
            if isinstance(v, Tensor) and v.numel() > 1 and not _is_like(v, p):
                raise ValueError(
                    f"the optimizer keeps {k} {tuple(v.shape)} of {names[p]} {tuple(p.shape)},"
                    " allowed for experts of several ranks: state of the weight's own shape, and"
                    " single numbers"
                )
    state: dict[Any, Any] = {}
    entries: dict[Any, Any] = dict(optimizer.state)  # by parameter, or by a name of the optimizer's
    for key, values in entries.items():
        if key in shards:
            values = {k: as_dtensor(v, mesh) if _is_like(v, key) else v for k, v in values.items()}
        if key not in names and not isinstance(key, str):
            raise ValueError(
                f"the optimizer has state of a {type(key).__name__} that is in none of its groups"
            )
        state[names.get(key, key)] = values
    groups = [
        {**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}


def parameter_names(module: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """Return the names of the module's and the optimizer's parameters.

    One that only the optimizer has is named by its place in the groups.
    """
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            names.setdefault(p, f"{OUTSIDE_MODULE}/{i}/{j}")
    return names


def split(
    checkpoint: dict[str, Any], module: nn.Module, mesh: Mesh
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split Lightning's checkpoint dictionary into named tensors and the rest.

    Random states are added. Tensors are the module's own, and state of optimizers that is like its
    weight or, except of experts of several ranks, a single number. In the rest, MODULE has the
    further entries of the state_dict by name, and OPTIMIZER the further state by `<number>.<name>`.
    """
    tensors = {f"rng.{name}.{mesh.rank}": state for name, state in rng_states().items()}
    meta = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
    is_kept, entries = kept_in(module), checkpoint["state_dict"].items()
    tensors.update({f"model.{name}": t for name, t in entries if is_kept(t)})
    if further := {name: x for name, x in entries if not is_kept(x)}:
        meta[MODULE] = further
    if "optimizer_states" in checkpoint:
        meta["param_groups"] = [state["param_groups"] for state in checkpoint["optimizer_states"]]
        parameters = dict(module.named_parameters())
        experts = {name for name, _ in expert_parameters(module)} if mesh.ep_size > 1 else set()
        for i, state in enumerate(checkpoint["optimizer_states"]):
            for name, values in state["state"].items():
                moments = _moments(values, parameters.get(name), name in experts)
                tensors.update({f"optimizer_{i}.{name}.{k}": v for k, v in moments.items()})
                if not isinstance(values, dict) or len(moments) < len(values):
                    others = (
                        {k: v for k, v in values.items() if k not in moments} if moments else values
                    )
                    meta.setdefault(OPTIMIZER, {})[f"{i}.{name}"] = others
    return tensors, meta


def _moments(values: Any, weight: Tensor | None, of_rank: bool) -> dict[str, Tensor]:
    """Return the state of a weight in tensors that ranks can join.

    They are like the weight, or a single number. of_rank: the weight is this rank's own, as
    experts are; its single numbers are left out, because other ranks may have others.
    """
    if weight is None or not isinstance(values, dict):
        return {}

    def can_be_joined(v: Any) -> bool:
        if not isinstance(v, Tensor):
            return False
        return v.shape == weight.shape or isinstance(v, DTensor) or (v.numel() == 1 and not of_rank)

    return {k: v for k, v in values.items() if can_be_joined(v)}


def check_types(tensors: Mapping[str, Tensor]) -> None:
    """Raise TypeError for a tensor that the files cannot hold.

    It is of another type or layout, or without memory.
    """
    refused = {dtype for dtype in {t.dtype for t in tensors.values()} if not _can_be_stored(dtype)}
    for name, tensor in tensors.items():
        part = local(tensor)
        if tensor.dtype in refused:
            what = f"its type is {tensor.dtype}, which safetensors does not have"
        elif part.layout != torch.strided:
            what = f"its layout is {part.layout}"
        elif part.numel() and _memory(part)[1] == 0:
            what = (
                f"it is a {type(part).__name__} without memory of its own on the device"
                f" {part.device}"
            )
        else:
            continue
        raise TypeError(
            f"{name} cannot be saved: {what}. Convert it to plain tensors, or leave it out"
        )


def _can_be_stored(dtype: torch.dtype) -> bool:
    try:
        return load(save({"x": torch.empty(1, dtype=dtype)}))["x"].dtype == dtype
    except (KeyError, ValueError, RuntimeError, SafetensorError):
        return False


def each_in_its_own_storage(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors; copy those that safetensors refuses.

    It refuses other strides (channels_last), and a second name of one storage.
    """
    seen = set[int]()
    for name, tensor in tensors.items():
        part = local(tensor)
        if not part.is_contiguous() or part.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(part.data_ptr())
        yield name, tensor


def as_dtensor(experts: Tensor, mesh: Mesh) -> Tensor:
    """Return a DTensor of all experts.

    experts: this rank's share of them, or a DTensor that splits it on dim 1.
    """
    over_edp = Shard(1) if isinstance(experts, DTensor) else Replicate()
    return DTensor.from_local(
        local(experts).detach(), mesh.device_mesh, [over_edp, Shard(0)], run_check=False
    )


def _is_like(value: Any, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape


def to_json(x: Any, store: Callable[[Tensor], str]) -> Any:
    """Convert containers, numbers, strings and tensors to JSON values. TypeError: anything else.

    store: takes a large tensor and returns the name under which it is stored.
    """
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, Encoded):
        return x.json
    if isinstance(x, DTensor):
        raise TypeError(
            "a checkpoint holds DTensors of parameters alone. Keep x.to_local() of this one"
        )
    if isinstance(x, Tensor):
        if x.numel() > LARGEST_IN_JSON or x.is_complex():
            return {"__stored__": store(x)}
        return {"__tensor__": x.tolist(), "dtype": str(x.dtype).removeprefix("torch.")}
    if isinstance(x, list):
        return [to_json(v, store) for v in x]
    if isinstance(x, tuple):
        return {"__tuple__": [to_json(v, store) for v in x]}
    if isinstance(x, (set, frozenset)):  # sorted, because ranks hash strings differently
        return {
            "__set__": sorted((to_json(v, store) for v in x), key=json.dumps),
            "frozen": isinstance(x, frozenset),
        }
    if isinstance(x, dict):
        if all(isinstance(k, str) for k in x) and not MARKS & x.keys():
            return {k: to_json(v, store) for k, v in x.items()}
        return {"__items__": [[to_json(k, store), to_json(v, store)] for k, v in x.items()]}
    if isinstance(x, Path):
        return str(x)
    raise TypeError(
        f"a checkpoint holds tensors and plain values, not {type(x).__name__}: {x!r:.80}"
    )


def to_text(x: Any) -> str:
    """Return JSON text that `from_json` can read. TypeError: as `to_json`, or it cannot be read."""
    text = json.dumps(to_json(x, lambda tensor: "elsewhere"))
    json.loads(text, object_hook=from_json)
    return text


def from_json(x: dict[str, Any]) -> Any:
    """Return the value that `to_json` has written as this JSON object.

    It is the object_hook for such a text: called for each JSON object, the inner ones first.
    """
    if "__tuple__" in x:
        return tuple(x["__tuple__"])
    if "__tensor__" in x:
        dtype = getattr(torch, x["dtype"])
        assert isinstance(dtype, torch.dtype)
        return torch.tensor(x["__tensor__"], dtype=dtype)
    if "__stored__" in x:
        return Stored(x["__stored__"])
    if "__set__" in x:
        return frozenset(x["__set__"]) if x["frozen"] else set(x["__set__"])
    return dict(x["__items__"]) if "__items__" in x else x


def rng_states() -> dict[str, Tensor]:
    """Return the states of torch, of Python and of NumPy's legacy generator.

    Torch has one of the CPU, and one of the GPU if it is in use. This library draws from torch
    alone; a user's own transforms may draw from the others.
    """
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    assert (version, kind) == (3, "MT19937"), "both generators are Mersenne twisters"
    states = {
        "host": torch.get_rng_state(),
        "python": _pack(words, gauss),
        "numpy": _pack(
            [*np.asarray(key).tolist(), int(position)], float(numpy_gauss) if has_gauss else None
        ),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["host"])
    if "python" in states:
        words, gauss = _unpack(states["python"])
        random.setstate((3, tuple(words), gauss))
    if "numpy" in states:
        (*key, position), gauss = _unpack(states["numpy"])
        np.random.set_state(
            ("MT19937", np.array(key, np.uint32), position, int(gauss is not None), gauss or 0.0)
        )
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _pack(words: Sequence[int], gauss: float | None) -> Tensor:
    """Return 624 words and the position, and what is left of a pair of normals.

    The last two numbers say whether the second of the pair is left over, and give its bits.
    """
    bits = torch.tensor(gauss or 0.0, dtype=torch.float64).view(torch.int64)
    return torch.tensor([*words, gauss is not None, bits.item()], dtype=torch.int64)


def _unpack(state: Tensor) -> tuple[list[int], float | None]:
    *words, has_gauss = state[:-1].tolist()
    return words, state[-1:].view(torch.float64).item() if has_gauss else None
