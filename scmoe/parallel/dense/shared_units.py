"""Split weights and several batches in flight: a unit is gathered once and its gradients are summed
once for all batches that take turns in it (moe/turns.py).

    forward    batch 1 enters: gather | batch 2 enters | 1 leaves | 2 leaves: split again
    backward   2 enters: gather | 1 enters | 2 leaves | 1 leaves: sum, split again

For one batch FSDP's own calls are made. A second forward pass may begin before the backward of the
first one: the calls of each pass are counted apart.
"""

from typing import Any

from torch.distributed.fsdp import FSDPModule

from scmoe.moe.turns import Turns, current_turns
from scmoe.parallel.torch_seam import UnitCalls, intercept


def share_between_turns(unit: FSDPModule) -> None:
    """Let a unit be gathered once, and its gradients be summed once, for all batches that take
    turns in it."""
    intercept(unit, lambda calls: _Shared(calls).calls())


class _Pass:
    """A forward pass through a unit. forwards, backwards: how many of its batches have not yet left
    the unit in that direction."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.forwards = turns.batches
        self.backwards = 0


class _Shared:
    """FSDP's calls for one group of parameters, made for the first batch that enters and the last
    one that leaves."""

    def __init__(self, of_fsdp: UnitCalls) -> None:
        self.of_fsdp = of_fsdp
        self.forward: _Pass | None = None  # the last one; None: of one batch
        self.backward: _Pass | None = None  # that leaves now; None: of one batch

    def calls(self) -> UnitCalls:
        return self.of_fsdp._replace(
            enter=self.enter, leave=self.leave, leave_backward=self.leave_backward
        )

    def enter(self, module: Any, args: Any, kwargs: Any) -> Any:
        turns = current_turns()
        if turns is None:
            self.forward = None
            return self.of_fsdp.enter(module, args, kwargs)
        if self.forward is None or self.forward.turns is not turns:
            self.forward = _Pass(turns)
        self.of_fsdp.forget_batch()
        inputs = self.of_fsdp.enter(module, args, kwargs)
        if inputs[0] is not args or inputs[1] is not kwargs:  # FSDP awaits their gradients
            self.forward.backwards += 1
            self.of_fsdp.before_leaving(inputs, self.begin_to_leave, self.forward)
        return inputs

    def leave(self, module: Any, args: Any, output: Any) -> Any:
        if self.forward is not None:
            self.forward.forwards -= 1
            if self.forward.forwards > 0:
                return output
        return self.of_fsdp.leave(module, args, output)

    def begin_to_leave(self, of: _Pass) -> None:
        self.backward = of

    def leave_backward(self, *unused: Any) -> None:
        leaving, self.backward = self.backward, None
        if leaving is not None:
            leaving.backwards -= 1
            if leaving.backwards > 0:
                return
        self.of_fsdp.leave_backward(*unused)
