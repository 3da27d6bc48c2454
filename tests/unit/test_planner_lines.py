"""The hidden share of communication is logged where it can be measured, and what ran is printed once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scmoe.planning.planner import Overlap, Planner
from scmoe.planning.pricing import LayerChoice
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.schedule import Schedule
from scmoe.training.callbacks.adaptive_schedule import AdaptiveSchedule


def test_a_hidden_share_is_none_where_communication_is_below_the_noise():
    """Per direction. The times are those of one layer in turn and without transfers."""
    planner = Planner.__new__(Planner)
    forward = {"dispatch": 0.025, "combine": 0.025, "attention": 0.05}
    backward = {"dispatch": 0.0005, "combine": 0.0005, "attention": 0.05}
    planner.choices = [LayerChoice(Schedule("scmoe", "pos1", 1), {1: OperatorTimes(forward, backward)}, (0.1, 0.051))]
    planner.usual, planner.overlap, planner.drifted = [], None, 0
    planner.note_overlap(torch.tensor([[[0.06], [0.0505]]]))
    assert planner.overlap is not None
    assert planner.overlap.efficiency == [pytest.approx(0.8), None]
    assert planner.overlap.shares == [pytest.approx(0.5), pytest.approx(1 / 51, abs=1e-6)]


def test_what_ran_is_said_once_for_a_schedule_and_only_measured_shares_are_logged(capsys):
    """The planner measures again where times drift, and mostly finds the same schedule."""
    times = {1: OperatorTimes({"dispatch": 0.010, "combine": 0.010}, {"dispatch": 0.010, "combine": 0.010})}
    first = LayerChoice(Schedule("scmoe", "pos1", 1), times, (0.04, 0.04))
    other = replace(first, schedule=Schedule("scmoe", "pos1", 2))
    callback, logged = AdaptiveSchedule(auto=False, chunks=(1,)), []
    trainer: Any = SimpleNamespace(is_global_zero=True, accumulate_grad_batches=1, log_every_n_steps=1)
    module: Any = SimpleNamespace(log_dict=logged.append)
    said = []
    for choice in (first, replace(first, sequential=(0.05, 0.05)), other):
        overlap = Overlap([0.05, 0.05], [0.5, 0.5], [0.75, None])
        planner: Any = SimpleNamespace(end_step=lambda: None, choices=[choice], overlap=overlap, backend="gloo")
        callback.planner = planner
        callback.on_train_batch_end(trainer, module, None, None, 0)
        said.append(capsys.readouterr().err.count("ran: gloo, slot"))
    assert said == [1, 0, 1]
    assert logged == [{"overlap/forward": 0.75}] * 3
