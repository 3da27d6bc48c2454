"""Defines what a checkpoint holds: named tensors, and JSON for everything else.

    <name>.ckpt/manifest.json                    step, size and hash of every file
                meta.json                        everything except tensors
                shard-*.safetensors              (or all.safetensors) model.<name>, optimizer_<i>.<name>.<state>,
                                                 rng.<generator>.<rank>

DTensor is used only here, to say which slice of an expert weight a rank holds. Nothing in these files can execute code
when it is read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from scmoe.parallel.checkpoint.random_state import rng_states
from scmoe.parallel.mesh import ParallelContext, expert_parameters

META = "meta.json"
FULL = "all.safetensors"


def model_state(module: nn.Module, context: ParallelContext) -> dict[str, Tensor]:
    """Return the module's tensors by name, expert shards as DTensors. They share storage with the module, so reading
    into them loads the module. A tied weight occurs once, under its first name."""
    shards = {name for name, _ in expert_parameters(module)}
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in module.named_parameters()}
    state = ((name, t) for name, t in module.state_dict().items() if name not in tied)
    return {name: as_dtensor(t, context) if name in shards else t for name, t in state}


def optimizer_state(module: nn.Module, optimizer: Optimizer, context: ParallelContext) -> dict[str, Any]:
    """Return {"state": {parameter name: {...}}, "param_groups": [...]}, with names in place of torch's positions."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    shards = {p for _, p in expert_parameters(module)}
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
    return tensors, meta


def as_dtensor(shard: Tensor, context: ParallelContext) -> Tensor:
    return DTensor.from_local(shard.detach(), context.mesh, [Replicate(), Shard(0)], run_check=False)


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
        if all(isinstance(k, str) for k in x):
            return {k: to_json(v) for k, v in x.items()}
        return {"__items__": [[to_json(k), to_json(v)] for k, v in x.items()]}
    if isinstance(x, Path):
        return str(x)
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(x).__name__}: {x!r:.80}")


def from_json(x: dict[str, Any]) -> Any:
    """The object_hook for a text of `to_json`: called for each JSON object, the inner ones first."""
    if "__tensor__" in x:
        dtype = getattr(torch, x["dtype"])
        assert isinstance(dtype, torch.dtype)
        return torch.tensor(x["__tensor__"], dtype=dtype)
    return dict(x["__items__"]) if "__items__" in x else x
