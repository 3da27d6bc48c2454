"""The only file that uses undocumented names of torch. Each function says what it gives.

An upgrade can rename or change any of them without notice, so tests/unit/test_private_names.py
checks each name and refuses its use elsewhere.
"""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
    TrainingState,
)
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel


def hide_from_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Make DDP ignore these parameters too. names: from `module`."""
    ignored = {*getattr(module, "_ddp_params_and_buffers_to_ignore", []), *names}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(ignored))


def split_over(mesh: DeviceMesh, dim: int) -> ShardPlacementResult:
    """Return the placement with which FSDP splits a parameter on `dim` over a mesh's last axis.

    Over the first of two axes it keeps copies. Call it once for a mesh: FSDP refuses two placements
    for one process group.
    """
    kind = FSDPMeshInfo(mesh, shard_mesh_dim=0) if mesh.ndim == 1 else HSDPMeshInfo(mesh, 1, 0)
    return ShardPlacementResult(Shard(dim), kind)


def gather_as_kept(unit: FSDPModule, placement: ShardPlacementResult) -> None:
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


def share_between_turns(unit: FSDPModule, current_turns: Callable[[], Any]) -> None:
    """Let a unit be gathered once, and its gradients be summed once, for all batches that take
    turns in it.

    current_turns: returns an object with the `number` of these batches, another one for each pass;
    None: there is one batch."""
    for group in unit._get_fsdp_state()._fsdp_param_groups:
        _SharedBetweenTurns(group, current_turns)


class _SharedBetweenTurns:
    """Calls of FSDP for one group of parameters: the last batch that leaves the unit splits its
    weights again, in forward and in backward. For one batch they are FSDP's own."""

    def __init__(self, group: Any, current_turns: Callable[[], Any]) -> None:
        self.group, self.current_turns = group, current_turns
        self.pre_forward, self.post_forward = group.pre_forward, group.post_forward
        self.post_backward = group.post_backward
        self.turns: Any = None
        self.forwards = self.backwards = 0  # that have not ended yet
        group.pre_forward, group.post_forward = self.enter, self.leave
        group.post_backward = self.leave_backward

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        turns = self.current_turns()
        if turns is None or turns is not self.turns:
            self.turns, self.backwards = turns, 0
            self.forwards = 0 if turns is None else turns.number
        if turns is None:
            return self.pre_forward(module, args, kwargs)
        # else FSDP takes this batch for the one inside
        self.group._training_state = TrainingState.IDLE
        inputs = self.pre_forward(module, args, kwargs)
        # FSDP awaits the gradients of inputs
        self.backwards += inputs[0] is not args or inputs[1] is not kwargs
        return inputs

    def leave(self, module: Any, inputs: Any, output: Any) -> Any:
        self.forwards -= 1
        return output if self.forwards > 0 else self.post_forward(module, inputs, output)

    def leave_backward(self, *unused: Any) -> None:
        self.backwards -= 1
        if self.backwards <= 0:
            self.post_backward(*unused)


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def allow_graphs(number: int) -> None:
    """Let torch.compile keep as many graphs of one function.

    With more than 8, it would leave the others uncompiled.
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
    public = getattr(
        dist, "set_timeout", None
    )  # new in torch 2.15, where the private name warns at each call
    set_timeout = public or dist.distributed_c10d._set_pg_timeout
    set_timeout(timeout)


def urgent(timeout: timedelta) -> Any:
    """Return options of a group of NCCL whose kernels go before those of other groups.

    Torch warns of a group whose options have another timeout than the group.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options
