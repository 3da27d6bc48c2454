"""Fault 37: a bad request gives one line that names its key, before anything starts."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from scmoe.experiments.engine.command_line import call
from scmoe.training.run import train as run
from tests.support.configs import IMPOSSIBLE

pytestmark = [pytest.mark.faults, pytest.mark.representative]

KEYS = ("optim.lr", "moe.top_k", "moe.num_experts", "model.heads", "schedule.slot", "trainer.max_steps")
WRONG = ("word", "[1, 2]", "1.5.2", "nan", "-3", "{a: b}")


def bad_request(draw: random.Random) -> tuple[str, list[str]]:
    """Returns a key, and overrides that give it an impossible value."""
    kind = draw.randrange(6)
    if kind == 0:
        ep_size, share = draw.randint(2, 8), draw.randint(1, 4)
        wrong = ep_size * share + draw.randint(1, ep_size - 1)
        words = f"moe.num_experts={wrong} strategy.ep_size={ep_size} trainer.devices={ep_size}"
        return "strategy.ep_size", [*words.split(), f"data.global_batch_size={ep_size}"]
    if kind == 1:
        experts = draw.randint(2, 16)
        return "moe.top_k", [f"moe.num_experts={experts}", f"moe.top_k={experts + draw.randint(1, 5)}"]
    if kind == 2:
        heads = draw.randint(3, 9)
        return "model.dim", [f"model.heads={heads}", f"model.dim={2 * heads * draw.randint(4, 9) + 1}"]
    if kind == 3:
        position, slots = draw.choice([("pos1", 3), ("pos2", 4), ("pos3", 5)])
        words = [f"moe.position={position}", "moe.tap_norm=shared", f"schedule.slot={slots + draw.randint(0, 5)}"]
        return "schedule.slot", words
    if kind == 4:
        key = draw.choice(KEYS)
        return key, [f"{key}={draw.choice(WRONG)}"]
    key, words = draw.choice(IMPOSSIBLE)
    return key, words.split()


def test_37_each_of_a_hundred_bad_requests_gives_one_line_before_anything_starts(tmp_path: Path, capsys):
    draw = random.Random(0)
    (tmp_path / "empty.yaml").write_text("{}\n")
    with patch.object(dist, "init_process_group") as groups, patch.object(run, "train") as started:
        for _ in range(100):
            key, words = bad_request(draw)
            code = call("train", str(tmp_path / "empty.yaml"), *words, f"runs_dir={tmp_path / 'runs'}")
            said = capsys.readouterr().err.splitlines()
            assert code == 2 and len(said) == 1, (words, said)
            assert said[0].startswith("error: ") and key in said[0], (words, said)
    assert not groups.called and not started.called
    assert not (tmp_path / "runs").exists()
