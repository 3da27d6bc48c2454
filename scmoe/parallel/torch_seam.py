"""The only file that uses undocumented names of torch. Each function says what it gives.

An upgrade can rename or change any of them without notice, so tests/test_private_names.py
checks each name and refuses its use elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    TrainingState,
)
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel


def hide_from_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Make DDP ignore these parameters too. names: from `module`."""
    ignored = {*getattr(module, "_ddp_params_and_buffers_to_ignore", []), *names}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(ignored))


def split_over(mesh: DeviceMesh, dim: int) -> Any:
    """Return the placement with which FSDP splits a parameter on `dim` over a mesh's last axis.

    Over the first of two axes it keeps copies. Call it once for a mesh: FSDP refuses two placements
    for one process group. RuntimeError: this torch cannot place single parameters.
    """
    try:  # here, as torch 2.10 and 2.11 lack it, and whole weights do not need it
        from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
    except ImportError:
        raise RuntimeError(
            f"torch is {torch.__version__}, but split dense weights need 2.12 or later. Install it,"
            " or use strategy.dense=replicated"
        ) from None
    kind = FSDPMeshInfo(mesh, shard_mesh_dim=0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, 1, 0)
    return ShardPlacementResult(Shard(dim), kind)


def gather_as_kept(unit: FSDPModule, placement: Any) -> None:
    """Gather the parameters placed by `placement` in their own dtype.

    The unit's mixed-precision policy is ignored for them. Call it before the first forward.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    groups: list[Any] = unit._get_fsdp_state()._fsdp_param_groups
    for group in groups:
        if group.mesh_info is placement.mesh_info:
            group.mp_policy = policy
            for parameter in group.fsdp_params:  # from torch 2.15 on each has its own
                parameter.mp_policy = policy


def gather_in_background(module: FSDPModule) -> None:
    """Let all units in `module` begin a gather, and wait for it where its weights are used."""
    module._set_unshard_async_op(True)


class UnitCalls(NamedTuple):
    """What FSDP calls for a group of parameters of a unit.

    enter(module, args, kwargs): before forward; returns args and kwargs, other objects if FSDP
    awaits their gradients. leave(module, args, output): after forward; returns the output.
    leave_backward(): when the gradients of what `enter` returned are complete, and at the end of
    backward where FSDP has awaited none. forget_batch(): let the next `enter` expect no batch in
    the unit. before_leaving(inputs, f, x): call f(x) right before the `leave_backward` of what
    `enter` returned.
    """

    enter: Callable[[nn.Module, Any, Any], Any]
    leave: Callable[[nn.Module, Any, Any], Any]
    leave_backward: Callable[..., None]
    forget_batch: Callable[[], None]
    before_leaving: Callable[[Any, Callable[[Any], None], Any], None]


def intercept(unit: FSDPModule, around: Callable[[UnitCalls], UnitCalls]) -> None:
    """Let FSDP make other calls for each group of parameters of a unit. around: gets FSDP's own,
    and returns what is called instead of its first three."""

    def intercept_group(group: Any) -> None:
        def forget_batch() -> None:
            group._training_state = TrainingState.IDLE

        calls = UnitCalls(
            group.pre_forward,
            group.post_forward,
            group.post_backward,
            forget_batch,
            _before_leaving,
        )
        instead = around(calls)
        group.pre_forward = instead.enter
        group.post_forward = instead.leave
        group.post_backward = instead.leave_backward

    for group in unit._get_fsdp_state()._fsdp_param_groups:
        intercept_group(group)


def _before_leaving(inputs: Any, f: Callable[[Any], None], x: Any) -> None:
    # all inputs that have a gradient are outputs of one node, whose backward leaves the unit
    first = next(tensor for tensor in _tensors_in(inputs) if tensor.requires_grad)
    assert first.grad_fn is not None
    first.grad_fn.register_prehook(lambda _: f(x))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors_in(one)


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def allow_graphs(number: int) -> None:
    """Let torch.compile keep up to `number` graphs of one function.

    By default the limit is 8; code beyond it runs uncompiled.
    """
    import torch._dynamo  # here, as it takes a second

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, number)


def call_after_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward pass that runs now is complete.

    Only a hook of that pass may ask for it.
    """
    Variable._execution_engine.queue_callback(callback)


def set_default_timeout(timeout: timedelta) -> None:
    """Let no later collective of the default process group wait longer.

    Single receives over gloo keep their limit.
    """
    # new in torch 2.15, where the private name warns at each call
    public = getattr(dist, "set_timeout", None)
    set_timeout = public or dist.distributed_c10d._set_pg_timeout
    set_timeout(timeout)


def urgent(timeout: timedelta) -> Any:
    """Return options of a group of NCCL whose kernels go before those of other groups.

    Torch warns of a group whose options have another timeout than the group.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options
