"""Batches take turns on one rank: while the rows of one travel, another one computes.

    batch 1   compute | its rows travel ... | compute | ...
    batch 2           | compute             | its rows travel ...

Each batch runs in a greenlet, a function that can be paused at any depth. `pass_turn` pauses it
before a wait for a transfer, and `in_turns` lets the next batch continue. So blocks know nothing of
it. All batches run on one thread, where autograd numbers its nodes in the order in which they ran.
Backward therefore takes turns in the reverse order, without any greenlet.

Torch keeps its modes (autocast, no_grad, hooks of saved tensors) for each thread. So no batch may
enter one before a wait and leave it after the wait: the other batches would run in it.
"""

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

from greenlet import getcurrent, greenlet


class Turns:
    """One call of `in_turns`. number: of its batches."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Batch(greenlet):
    def __init__(self, function: Callable[[], Any], turns: Turns) -> None:
        super().__init__(function)
        self.turns = turns
        self.gr_context = copy_context()


def in_turns(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return the results of the functions. The first one begins, and each runs until it passes its
    turn or ends.

    What a function raises is raised here; the others are then ended, so that none of them stays
    paused.
    """
    turns = Turns(len(functions))
    batches = [_Batch(function, turns) for function in functions]
    results: dict[_Batch, Any] = {}
    try:
        while len(results) < len(batches):
            for batch in batches:
                if not batch.dead:
                    result = batch.switch()
                    if batch.dead:
                        results[batch] = result
    finally:
        for batch in batches:
            if not batch.dead:
                batch.throw()
    return [results[batch] for batch in batches]


def pass_turn() -> None:
    """Let the other batches run, and return at the next turn of this one. Return at once if it runs
    alone."""
    current = getcurrent()
    if isinstance(current, _Batch):
        assert current.parent is not None
        current.parent.switch()


def current_turns() -> Turns | None:
    """Return the turns that are being taken now; None: a batch runs alone."""
    current = getcurrent()
    return current.turns if isinstance(current, _Batch) else None
