"""Trainings that take turns wait in each batch of a step, and end together."""

from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.bench.training import taking_turns
from experiments.engine import links
from experiments.engine.ranks import RankError

pytestmark = [pytest.mark.ranks, pytest.mark.smoke]


def test_a_step_waits_in_each_of_its_batches(monkeypatch):
    schedule = taking_turns.AdaptiveSchedule(auto=True, chunks=(1,))
    schedule.planner = SimpleNamespace(overlap=SimpleNamespace(seconds=(1.5, 2.75)))
    caller, turn = Pipe()
    held = taking_turns.TrainingTurns(turn, ends=(1,))
    monkeypatch.setattr(links, "set_rate", lambda mbit: None)
    caller.send(None)  # the next turn
    trainer = SimpleNamespace(callbacks=[schedule], accumulate_grad_batches=4, global_step=0)
    for step in (0, 0, 0, 1):
        held.on_train_batch_start(trainer)
        activations = torch.ones(2**18)
        trainer.global_step = step
        held.on_train_batch_end(trainer)
        del activations
    assert caller.recv()[1] == 4 * 4.25 and not caller.poll()
    assert 1.0 <= held.peak_mb < 2.0, "of one batch, whose activations are freed"


def test_a_training_that_ends_before_its_last_turn_is_an_error(monkeypatch):
    def ends_early(ranks: int, theirs: list[Any]) -> dict[str, Any]:
        theirs[0].close()
        return {}

    monkeypatch.setattr(taking_turns, "in_own_network", ends_early)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RankError, match="before its last turn"):
        taking_turns.Training(pool, 1).turn(None)
