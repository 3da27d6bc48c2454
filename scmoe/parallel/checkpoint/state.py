"""Defines what a checkpoint holds: named tensors, random states among them, and JSON for everything else.

    <name>.ckpt/manifest.json                    step, size and hash of every file
                meta.json                        everything except tensors
                shard-*.safetensors              (or all.safetensors) model.<name>, optimizer_<i>.<name>.<state>,
                                                 rng.<generator>.<rank>

A DTensor says which slice of a weight a rank holds. Nothing in these files can execute code
when it is read.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from scmoe.parallel.dense import local
from scmoe.parallel.mesh import ParallelContext, expert_parameters

META = "meta.json"
MARKS = {"__tensor__", "__tuple__", "__items__"}  # keys by which `from_json` knows what is no JSON
FULL = "all.safetensors"


def model_state(module: nn.Module, context: ParallelContext) -> dict[str, Tensor]:
    """Return the module's tensors by name; tensors that are split over ranks are DTensors. They share storage with the
    module, so reading into them loads the module. A tied weight occurs once, under its first name. Calling `state_dict`
    makes FSDP split again what it has gathered."""
    shards = {name for name, _ in expert_parameters(module)}
    tied = tied_weights(module)
    state = ((name, t) for name, t in module.state_dict().items() if name not in tied)
    return {name: as_dtensor(t, context) if name in shards else t for name, t in state}


def own_part(module: nn.Module, state: dict[str, Tensor], context: ParallelContext) -> dict[str, Tensor]:
    """Return what this rank writes of `model_state`.

    Buffers, such as running statistics, may differ from rank to rank. Rank 0's are written, as DDP
    sends these to all ranks before each forward; else a checkpoint would mix those of several ranks.
    """
    if context.rank == 0:
        return state
    parameters = {name for name, _ in module.named_parameters()}
    return {name: t for name, t in state.items() if name in parameters or isinstance(t, DTensor)}


def tied_weights(module: nn.Module) -> dict[str, str]:
    """Return the further names of tied weights, each with the weight's first name."""
    first = {p: name for name, p in module.named_parameters()}
    return {name: first[p] for name, p in module.named_parameters(remove_duplicate=False) if name != first[p]}


def optimizer_state(module: nn.Module, optimizer: Optimizer, context: ParallelContext) -> dict[str, Any]:
    """Return {"state": {parameter name: {...}}, "param_groups": [...]}, with names in place of torch's positions.

    ValueError: state of experts that is neither of the weight's shape nor a number, so ranks' parts cannot be joined.
    TypeError: state that is no tensor and no number, such as the lists of LBFGS.
    """
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    shards = {p for _, p in expert_parameters(module)}
    for p, values in optimizer.state.items():
        for k, v in values.items():
            if not isinstance(v, (Tensor, int, float)):
                raise TypeError(
                    f"{type(optimizer).__name__} keeps {k} of {names[p]} as {type(v).__name__}; of an "
                    "optimizer a checkpoint holds tensors and numbers. Use another optimizer, or "
                    "save_weights_only=True"
                )
    for p in shards & optimizer.state.keys() if context.ep_size > 1 else ():
        for k, v in optimizer.state[p].items():
            if isinstance(v, Tensor) and v.numel() > 1 and not _is_like(v, p):
                raise ValueError(
                    f"the optimizer keeps {k} {tuple(v.shape)} of {names[p]} {tuple(p.shape)}, allowed for experts of "
                    "several ranks: state of the weight's own shape, and single numbers"
                )
    state = {
        names[p]: {k: as_dtensor(v, context) if p in shards and _is_like(v, p) else v for k, v in values.items()}
        for p, values in optimizer.state.items()
    }
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


def split(checkpoint: dict[str, Any], context: ParallelContext) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split Lightning's checkpoint dictionary into named tensors and the rest; add the random states."""
    tensors = {f"rng.{name}.{context.rank}": state for name, state in rng_states().items()}
    tensors.update({f"model.{name}": t for name, t in checkpoint["state_dict"].items()})
    meta = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
    if "optimizer_states" in checkpoint:
        meta["param_groups"] = [state["param_groups"] for state in checkpoint["optimizer_states"]]
        for i, state in enumerate(checkpoint["optimizer_states"]):
            for name, values in state["state"].items():
                tensors.update({f"optimizer_{i}.{name}.{k}": torch.as_tensor(v) for k, v in values.items()})
    return dict(_each_in_its_own_storage(tensors)), meta


def _each_in_its_own_storage(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Copy what safetensors refuses: other strides (channels_last), and a second name of the same storage."""
    seen = set[int]()
    for name, tensor in tensors.items():
        part = local(tensor)
        if not part.is_contiguous() or part.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(part.data_ptr())
        yield name, tensor


def as_dtensor(experts: Tensor, context: ParallelContext) -> Tensor:
    """Return a DTensor of all experts. experts: this rank's share of them, or a DTensor that splits it on dim 1."""
    over_edp = Shard(1) if isinstance(experts, DTensor) else Replicate()
    return DTensor.from_local(local(experts).detach(), context.mesh, [over_edp, Shard(0)], run_check=False)


def _is_like(value: Any, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape


def to_json(x: Any) -> Any:
    """Convert containers, numbers, strings and small tensors to JSON values. TypeError: anything else."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, Tensor):
        return {"__tensor__": x.tolist(), "dtype": str(x.dtype).removeprefix("torch.")}
    if isinstance(x, (list, tuple)):
        return [to_json(v) for v in x]
    if isinstance(x, dict):
        if all(isinstance(k, str) for k in x) and not MARKS & x.keys():
            return {k: to_json(v) for k, v in x.items()}
        return {"__items__": [[_key_to_json(k), to_json(v)] for k, v in x.items()]}
    if isinstance(x, Path):
        return str(x)
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(x).__name__}: {x!r:.80}")


def _key_to_json(x: Any) -> Any:
    return {"__tuple__": [_key_to_json(v) for v in x]} if isinstance(x, tuple) else to_json(x)


def to_text(x: Any) -> str:
    """Return the JSON text of `to_json`, which `from_json` can read. TypeError: as `to_json`, or it cannot be read."""
    text = json.dumps(to_json(x))
    json.loads(text, object_hook=from_json)
    return text


def check_can_be_saved(trainer: Any) -> None:
    """Raise TypeError for hyper-parameters, or for state of a callback, that a checkpoint could not hold."""
    states: list[tuple[str, Any]] = []
    for holder in (trainer.lightning_module, trainer.datamodule):
        if holder is not None:
            states.append((f"a hyper-parameter of {type(holder).__name__}", holder.hparams))
    for callback in trainer.callbacks:
        with suppress(Exception):  # it may not have a state before the first step
            states.append((f"the state of the callback {type(callback).__name__}", callback.state_dict()))
    for what, state in states:
        try:
            to_text(state)
        except TypeError as error:
            raise TypeError(f"{what} cannot be saved: {error}. Convert it, or leave it out") from error


def from_json(x: dict[str, Any]) -> Any:
    """The object_hook for a text of `to_json`: called for each JSON object, the inner ones first."""
    if "__tuple__" in x:
        return tuple(x["__tuple__"])
    if "__tensor__" in x:
        dtype = getattr(torch, x["dtype"])
        assert isinstance(dtype, torch.dtype)
        return torch.tensor(x["__tensor__"], dtype=dtype)
    return dict(x["__items__"]) if "__items__" in x else x


def rng_states() -> dict[str, Tensor]:
    """Return the states of torch (CPU, and GPU if one is in use), of Python and of NumPy's legacy generator.

    This library draws from torch alone; a user's own transforms may draw from the others.
    """
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    assert (version, kind) == (3, "MT19937"), "both generators are Mersenne twisters"
    states = {
        "host": torch.get_rng_state(),
        "python": _pack(words, gauss),
        "numpy": _pack([*np.asarray(key).tolist(), int(position)], float(numpy_gauss) if has_gauss else None),
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
        np.random.set_state(("MT19937", np.array(key, np.uint32), position, int(gauss is not None), gauss or 0.0))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _pack(words: Sequence[int], gauss: float | None) -> Tensor:
    """Return 624 words and the position, whether the second of a pair of normals is left over, and that one's bits."""
    bits = torch.tensor(gauss or 0.0, dtype=torch.float64).view(torch.int64)
    return torch.tensor([*words, gauss is not None, bits.item()], dtype=torch.int64)


def _unpack(state: Tensor) -> tuple[list[int], float | None]:
    *words, has_gauss = state[:-1].tolist()
    return words, state[-1:].view(torch.float64).item() if has_gauss else None
