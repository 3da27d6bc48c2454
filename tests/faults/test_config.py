"""A bad request gives one line that names its key, before anything starts; a payload in it is not executed."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from scmoe.config.fields import Config
from scmoe.config.leaves import leaves
from scmoe.experiments.engine.command_line import call
from scmoe.training.run import train as run
from tests.support.configs import IMPOSSIBLE

pytestmark = [pytest.mark.faults, pytest.mark.representative]

KEYS = [leaf.key for leaf in leaves(Config()) if leaf.key != "trainer.extra"]  # which takes any plain value
NUMBERS = [leaf.key for leaf in leaves(Config()) if leaf.range]
WRONG = ("word", "[1, 2]", "1.5.2", "nan", "-inf", "-3", "true", "0x1g", "{a: b}")
NAMES = ("../x", "/etc/x", "a/../../b", "..", "-x", "a b", "a\\b", "$(ls)", "`ls`", "a;ls")
PAYLOADS = (
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:subprocess.Popen [['touch', '{}']]",
    "!!python/name:os.system\n  touch {}",
    "{{_target_: os.system, command: 'touch {}'}}",
    "'${{oc.env:HOME}}'",
    "'${{oc.create:{{a: 1}}}}'",
    "[[a], {{b: c}}]",
    "'${{'",
)


def bad_request(draw: random.Random, trace: Path) -> tuple[str, list[str]]:
    """Returns a key, and overrides that give it an impossible value; some would make the file `trace`."""
    kind = draw.randrange(7)
    if kind == 0:
        ep_size, share = draw.randint(2, 8), draw.randint(1, 4)
        wrong = ep_size * share + draw.randint(1, ep_size - 1)
        words = f"moe.num_experts={wrong} strategy.ep_size={ep_size} trainer.devices={ep_size}"
        return "strategy.ep_size", [*words.split(), f"data.global_batch_size={ep_size}"]
    if kind == 1:
        position, slots = draw.choice([("pos1", 3), ("pos2", 4), ("pos3", 5)])
        words = [f"moe.position={position}", "moe.tap_norm=shared", f"schedule.slot={slots + draw.randint(0, 5)}"]
        return "schedule.slot", words
    if kind == 2:
        key, text = draw.choice([each for each in IMPOSSIBLE if each[0] != "data.tokenizer"])  # it names runs/latest
        return key, text.split()
    if kind == 3:
        key, at = draw.choice(KEYS), draw.randint(1, 2)
        key = key[:at] + draw.choice("xyzq_.-") + key[at:]
        return key, [f"{key}=1"]
    key = draw.choice(KEYS if kind == 4 else NUMBERS if kind == 5 else ["name"])
    value = draw.choice({4: PAYLOADS, 5: WRONG, 6: NAMES}[kind])
    return key, [f"{key}={value.format(trace) if kind == 4 else value}"]


def test_each_of_two_hundred_bad_requests_gives_one_line_before_anything_starts(tmp_path: Path, capsys):
    """Half of them are lines of a file."""
    draw, file, trace = random.Random(0), tmp_path / "bad.yaml", tmp_path / "executed"
    with patch.object(dist, "init_process_group") as groups, patch.object(run, "train") as started:
        for i in range(200):
            key, words = bad_request(draw, trace)
            lines = [word.replace("=", ": ", 1) for word in words] if i % 2 else []
            file.write_text("".join(f"{line}\n" for line in lines) or "{}\n")
            code = call("train", str(file), *([] if lines else words), f"runs_dir={tmp_path / 'runs'}")
            said = capsys.readouterr().err.splitlines()
            assert code == 2 and len(said) == 1, (words, said)
            assert said[0].startswith("error: ") and (key in said[0] or "line 1" in said[0]), (words, said)
    assert not groups.called and not started.called
    assert not (tmp_path / "runs").exists() and not trace.exists()
