"""Few calls lie between the train command and the experts."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from experiments.engine.ranks import run_ranks
from scmoe.command_line import call
from scmoe.moe.experts import Experts

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[3]
# Trainer.fit and the Strategy's training_step are two of them; calls inside Lightning and torch do
# not count
CALLS = 15


def calls(rank: int, world_size: int, runs: Path) -> list[str]:
    """Return the functions of this project that are running when the experts compute for the first
    time."""
    found: list[str] = []
    forward = Experts.forward

    def noted(self: Experts, *inputs: Any) -> Any:
        if not found:
            frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
            ours = [
                f
                for f in frames
                if Path(f.filename).relative_to(ROOT).parts[0] in ("scmoe", "experiments")
            ]
            found.extend(f"{Path(f.filename).name}:{f.name}" for f in ours)
        return forward(self, *inputs)

    settings = (
        "logger.mode=disabled",
        "trainer.max_steps=1",
        "trainer.val_every=1",
        "trainer.progress=false",
    )
    with patch.object(Experts, "forward", noted):
        assert call("train", str(ROOT / "configs/debug.yaml"), f"runs_dir={runs}", *settings) == 0
    return found[found.index("train.py:start") :]


def test_few_calls_lie_between_the_train_command_and_the_experts(tmp_path):
    (functions,) = run_ranks(calls, 1, tmp_path)
    assert functions[:2] == ["train.py:start", "train.py:train"]
    # with Trainer.fit and Experts.forward it is one call more
    assert len(functions) + 1 <= CALLS, functions
