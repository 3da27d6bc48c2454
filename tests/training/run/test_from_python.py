"""`scmoe.train` in an interactive Python, as in a notebook: on one rank in the process, on two in
others. It starts Python four times, so it is of the fault suite."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from scmoe.config.load import load_config
from scmoe.training.run import from_python
from tests.support.commands import ROOT, environment

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

PROGRAM = """
import json
import sys
from dataclasses import replace
import lightning.pytorch as pl
import scmoe
import scmoe.lightning

words = ["runs_dir=" + sys.argv[1], "trainer.max_steps=2", "logger.mode=disabled"]
words += ["data.name=synthetic"]
words += ["data.vocab_size=64", "trainer.accelerator=cpu", "trainer.log_every=1"]
config = scmoe.load_config("debug", words)
for devices in (1, 2):
    run = scmoe.train(replace(config, trainer=replace(config.trainer, devices=devices)))
    steps = [row["train/loss"] for row in run.metrics if "train/loss" in row]
    found = [run.state, run.summary["world_size"], len(steps), type(scmoe.load(run.path)).__name__]
    print(json.dumps(found), flush=True)
try:
    pl.Trainer(accelerator="cpu", devices=2, strategy="expert_parallel")
except RuntimeError as error:
    print(json.dumps(["fork" in str(error)]), flush=True)
"""


def test_a_notebook_trains_on_one_rank_and_on_two(tmp_path):
    """`-i` makes Lightning take the process for a notebook's."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-i", str(tmp_path / "program.py"), str(tmp_path / "runs")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), input="", capture_output=True, text=True, timeout=300
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [["finished", 1, 2, "GPT"], ["finished", 2, 2, "GPT"], [True]], done.stderr
    assert done.stderr.count("step 2/2") == 4, "the lines of both trainings are shown"


def test_what_an_extension_prints_is_passed_on_and_is_not_the_summary(monkeypatch, capsys):
    class Ended:
        returncode = 0
        stdout = StringIO('hello\n{"run_dir": "runs/a", "steps": 2}\nbye\n')
        stderr = StringIO("")

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(from_python, "checked_model", lambda config: None)
    monkeypatch.setattr(from_python.subprocess, "Popen", lambda *_, **__: Ended())
    config = load_config("debug", ["trainer.devices=2"])
    assert from_python.train_from_python(config) == Path("runs/a").absolute()
    assert capsys.readouterr().out == "hello\nbye\n"
