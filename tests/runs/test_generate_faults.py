"""Ranks that die while texts are generated, and Ctrl-C. Requests that cannot be met:
runs/test_generate_ranks.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from scmoe.command_line import call
from scmoe.parallel.checkpoint.durable import process_start
from scmoe.runs.on_ranks import ending_together
from tests.support.commands import children, running, train_on_text

pytestmark = [pytest.mark.ranks, pytest.mark.faults, pytest.mark.inference]

# of a collective; until all processes have ended, with the interpreter's end
TIMEOUT_S, PATIENCE_S = (15.0, 60.0)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    (folder / "prompts.jsonl").write_text(20_000 * (json.dumps({"prompt": "Peace"}) + "\n"))
    return train_on_text(folder, 1, "data.seq_len=48", "trainer.max_steps=1", "trainer.val_every=1")


@contextlib.contextmanager
def generating(run_dir: Path, out: Path):
    """Yield the two ranks' processes once texts have been written; nothing of them is left
    afterwards."""
    asked = [
        "--prompts",
        str(run_dir.parents[1] / "prompts.jsonl"),
        "--out",
        str(out),
        "--max-tokens",
        "40",
    ]
    command = ["-m", "scmoe", "generate", str(run_dir), *asked]
    with running(*command, "trainer.devices=2", f"strategy.timeout_s={TIMEOUT_S}") as process:
        deadline = time.monotonic() + 3 * PATIENCE_S
        while not (out.exists() and out.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "no text is written"
            time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
        (other,) = children(process.pid)
        yield process, other


def said_at_the_end(process: subprocess.Popen[str], other: int) -> str:
    """Wait until both ranks have ended and closed their stderr."""
    _, said = process.communicate(timeout=TIMEOUT_S + PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while process_start(other):
        assert time.monotonic() < deadline, "rank 1 is still there"
        time.sleep(0.1)
    return said


@pytest.mark.parametrize(("rank", "how"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_rank_that_dies_while_texts_are_generated_ends_all(run_dir, tmp_path, rank, how):
    with generating(run_dir, tmp_path / "out.jsonl") as (process, other):
        os.kill((process.pid, other)[rank], how)
        said = said_at_the_end(process, other)
    assert process.returncode != 0
    assert f"roll call: no answer from rank {rank}" in said, said
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert all(json.loads(line)["tokens"] for line in lines), "what is finished is kept"


def test_ctrl_c_ends_all_ranks(run_dir, tmp_path):
    with generating(run_dir, tmp_path / "out.jsonl") as (process, other):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said_at_the_end(process, other)
    assert process.returncode == 130


@pytest.mark.representative
@pytest.mark.parametrize(
    ("is_launched", "code"), [(False, 130), (True, 0)], ids=["rank 0", "a rank that it started"]
)
def test_ctrl_c_is_the_exit_code_of_rank_0_alone(is_launched, code):
    """Lightning's launcher kills rank 0 where another rank ends with any other code than 0."""
    errors = []
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(on_exception=errors.append, is_launched=is_launched)
    )
    with pytest.raises(SystemExit) as end, ending_together(trainer):
        raise KeyboardInterrupt
    assert end.value.code == code and len(errors) == 1


@pytest.mark.representative
@pytest.mark.parametrize(
    ("verb", "first"),
    [("generate", "generate.find_weights"), ("evaluate", "evaluate.evaluation.find_checkpoint")],
)
def test_ctrl_c_before_ranks_exist_is_exit_code_130(verb, first, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"scmoe.runs.{first}", interrupted)
    (tmp_path / "checkpoints/step=1.ckpt").mkdir(parents=True)
    assert call(verb, str(tmp_path)) == 130
