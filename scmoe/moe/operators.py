"""The operators of a block under their names, and what a recorder of them can do.

Operators are what the schedule moves and the planner prices: route, encode, dispatch, experts,
combine, decode, attention (or its parts attention_core, attention_out), mlp, shared_expert,
current. In a profile they are called scmoe/<name>, but instead of `current` a profile shows the
operators inside it. recorder.py notes when each operator runs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.profiler import record_function

Direction = Literal["forward", "backward"]


class AnyRecorder(Protocol):
    """Notes operators and transfers."""

    def around(self, name: str, f: Callable[..., Any], *inputs: Any) -> Any:
        """Return f(*inputs) and note it under the operator's name."""

    def watch(self, name: str, direction: Direction, work: Any) -> None:
        """Note a transfer that has begun. work: has `wait`."""


class Operators(nn.Module):
    """A module whose forward is made of named operators.

    recorder: notes their times; None: they are not noted.
    """

    recorder: AnyRecorder | None = None

    def operator(self, name: str, f: Callable[..., Any], *inputs: Any) -> Any:
        if self.recorder is not None:
            f = partial(self.recorder.around, name, f)
        # a range takes time, and without a profiler nobody reads it
        if not torch.autograd._profiler_enabled():
            return f(*inputs)
        with record_function(f"scmoe/{name}"):
            return f(*inputs)

    def noted_as(self, name: str, f: Callable[..., Any], *inputs: Any) -> Any:
        """Run f as one operator of the recorder, but not of a profile, which shows the operators
        inside f: no range may be open where a batch passes its turn (turns.py)."""
        if self.recorder is None:
            return f(*inputs)
        return self.recorder.around(name, f, *inputs)


def range_of_profile(name: str) -> AbstractContextManager[Any]:
    """Return a context that a profile shows as scmoe/<name>; without a profiler, one that costs
    nothing."""
    return record_function(f"scmoe/{name}") if torch.autograd._profiler_enabled() else nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast; where there is none already, one that costs nothing."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
