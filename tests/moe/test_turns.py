"""Functions take turns, and each sees the context of its caller."""

from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from unittest.mock import patch

import pytest
import torch
from greenlet import getcurrent
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from scmoe.moe.turns import current_turns, in_turns, pass_turn


@pytest.mark.inference
def test_batches_may_have_different_numbers_of_turns_and_see_the_context_of_their_caller():
    variable = ContextVar("variable")
    variable.set("of the caller")

    def batch(turns):
        for _ in range(turns):
            pass_turn()
        return turns, variable.get()

    results = in_turns([partial(batch, 1), partial(batch, 3)])
    assert results == [(1, "of the caller"), (3, "of the caller")]


def test_functions_take_turns():
    order = []

    def function(name, waits):
        for step in range(waits):
            order.append(f"{name}{step}")
            pass_turn()
        assert current_turns().batches == 2
        return name

    assert in_turns([lambda: function("a", 3), lambda: function("b", 1)]) == ["a", "b"]
    assert order == ["a0", "b0", "a1", "a2"]
    assert current_turns() is None
    pass_turn()  # it returns where there are no turns


def test_an_error_ends_all_functions():
    ended = []

    def waits():
        try:
            pass_turn()
            pass_turn()
        finally:
            ended.append(getcurrent())

    def fails():
        pass_turn()
        raise ValueError("the second batch")

    with pytest.raises(ValueError, match="the second batch"):
        in_turns([waits, fails, waits])
    assert len(ended) == 2
    assert all(batch.dead for batch in ended)


def test_modes_around_the_turns_hold_inside():
    seen = []

    def function():
        pass_turn()
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.no_grad(), torch.autocast("cpu"), saved_tensors_hooks(lambda t: t, lambda t: t):
        in_turns([function, function])
    assert seen == [(False, True)] * 2


@contextmanager
def float64_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "saved_tensors_hooks": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
    "sdpa_kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    "set_default_dtype": lambda: float64_by_default(),
    "cuda.stream": lambda: patch.object(torch.cuda, "current_stream", lambda: "another one"),
}


@pytest.mark.parametrize("name", MODES)
def test_a_mode_that_is_open_over_a_pause_is_refused_by_its_name(name, monkeypatch):
    """The batch that waits meanwhile is ended, and the thread has its modes again. Without a GPU
    the stream is a text."""
    if name == "cuda.stream":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the usual one")

    def waits():
        with MODES[name]():
            pass
        pass_turn()

    def enters():
        with MODES[name]():
            pass_turn()

    assert in_turns([waits, waits]) == [None, None]
    with pytest.raises(RuntimeError, match=name):
        in_turns([waits, enters])
    assert in_turns([waits, waits]) == [None, None]


def test_a_gpu_that_is_first_used_while_a_batch_waits_is_no_open_stream(monkeypatch):
    """Another thread may use it first."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the usual one")

    def waits():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        pass_turn()

    assert in_turns([waits, waits]) == [None, None]
