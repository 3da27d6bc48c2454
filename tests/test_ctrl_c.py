"""Ctrl-C ends a command with exit code 130, whatever a library makes of it; pressed twice at once,
it is one Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from scmoe import command_line
from scmoe.lightning import stop as stops


@pytest.fixture(autouse=True)
def pythons_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def swallowed(*words: str) -> int:
    """Run a command whose import turns the interruption into another error."""
    try:
        press()
    except KeyboardInterrupt:
        press()
        raise ImportError("numpy failed to import") from None
    return 0


def exiting(*words: str) -> int:
    """Run a command that Lightning ends with 1."""
    try:
        press()
    except KeyboardInterrupt:
        raise SystemExit(1) from None
    return 0


@pytest.mark.parametrize("command", [swallowed, exiting])
def test_an_interrupted_command_returns_130(command, monkeypatch):
    monkeypatch.setattr(command_line, "answer", command)
    assert command_line.call("train") == 130
    press()  # while the process ends


def test_a_command_without_interruption_keeps_its_code_and_the_handler(monkeypatch):
    monkeypatch.setattr(command_line, "answer", lambda *words: 2)
    assert command_line.call("train") == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_of_a_training_ends_it_only_when_it_comes_later(monkeypatch):
    stop = stops.StopSignal()
    stop.take()
    try:
        press()
        press()
        assert (stop.received, stop.exit_code) == (True, 130)
        monkeypatch.setattr(stops, "AGAIN_S", 0.0)
        with pytest.raises(SystemExit) as ended:
            press()
        assert ended.value.code == 130
    finally:
        stop.give_back()
