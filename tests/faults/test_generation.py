"""Faults 61 to 63: ranks that die while texts are generated, Ctrl-C, and requests that cannot be met."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from scmoe.experiments.engine.command_line import call
from scmoe.runs.on_ranks import ending_together
from tests.support.commands import ROOT, train_in_ranks
from tests.support.sentences import sentences

pytestmark = [pytest.mark.dist, pytest.mark.faults, pytest.mark.inference]

TIMEOUT_S, PATIENCE_S = 15.0, 60.0  # of a collective; until all processes have ended, with the interpreter's end


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text("\n".join(sentences(700, seed) for seed in range(4)))
    prompts = "".join(json.dumps({"prompt": "Peace"}) + "\n" for _ in range(20_000))
    (folder / "prompts.jsonl").write_text(prompts)
    text = ("data.name=text", f"data.path={folder}/text.txt", "data.vocab_size=300", f"data.cache_dir={folder}/cache")
    sizes = ("data.seq_len=48", "trainer.max_steps=1", "trainer.val_every=1", f"runs_dir={folder}", "name=text")
    return Path(train_in_ranks(1, "configs/debug.yaml", *text, *sizes).summary["run_dir"]).resolve()


@contextlib.contextmanager
def generating(run_dir: Path, out: Path):
    """Yields the two ranks' processes once texts have been written; nothing of them is left afterwards."""
    asked = ["--prompts", str(run_dir.parents[1] / "prompts.jsonl"), "--out", str(out), "--max-tokens", "40"]
    command = [sys.executable, "-m", "experiments.generate", str(run_dir), *asked]
    process = subprocess.Popen(
        [*command, "trainer.devices=2", f"strategy.timeout_s={TIMEOUT_S}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 3 * PATIENCE_S
        while not (out.exists() and out.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "no text is written"
            time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
        other = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        yield process, int(*other)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def said_at_the_end(process: subprocess.Popen[str], other: int) -> str:
    """Waits until both ranks have ended and closed their stderr."""
    _, said = process.communicate(timeout=TIMEOUT_S + PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while is_running(other):
        assert time.monotonic() < deadline, "rank 1 is still there"
        time.sleep(0.1)
    return said


@pytest.mark.parametrize(
    ("rank", "how"), [pytest.param(1, signal.SIGKILL, marks=pytest.mark.representative), (0, signal.SIGSTOP)]
)
def test_61_a_rank_that_dies_while_texts_are_generated_ends_all(run_dir, tmp_path, rank, how):
    with generating(run_dir, tmp_path / "out.jsonl") as (process, other):
        os.kill((process.pid, other)[rank], how)
        said = said_at_the_end(process, other)
    assert process.returncode != 0
    assert f"roll call: no answer from rank {rank}" in said, said
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert all(json.loads(line)["tokens"] for line in lines), "what is finished is kept"


@pytest.mark.representative
def test_62_ctrl_c_ends_all_ranks(run_dir, tmp_path):
    with generating(run_dir, tmp_path / "out.jsonl") as (process, other):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said_at_the_end(process, other)
    assert process.returncode == 130


@pytest.mark.representative
@pytest.mark.parametrize(("is_launched", "code"), [(False, 130), (True, 0)], ids=["rank 0", "a rank that it started"])
def test_62_ctrl_c_is_the_exit_code_of_rank_0_alone(is_launched, code):
    """Lightning's launcher kills rank 0 where another rank ends with any other code than 0."""
    errors = []
    trainer = SimpleNamespace(strategy=SimpleNamespace(on_exception=errors.append, is_launched=is_launched))
    with pytest.raises(SystemExit) as end, ending_together(trainer):
        raise KeyboardInterrupt
    assert end.value.code == code and len(errors) == 1


@pytest.mark.representative
@pytest.mark.parametrize(
    ("verb", "first"), [("generate", "continuation.find_weights"), ("evaluate", "evaluate.evaluation.find_checkpoint")]
)
def test_62_ctrl_c_before_ranks_exist_is_exit_code_130(verb, first, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"scmoe.runs.{first}", interrupted)
    assert call(verb, str(tmp_path)) == 130


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-tokens", "48"], "1 tokens and max_tokens is 48, allowed: 48 together"),
        (["--prompt", "Peace" * 60], "shorten the prompt"),
        (["--temperature", "nan"], "temperature is nan, allowed: 0"),
        (["--out", "/none/out.jsonl", "--prompts", "PROMPTS"], "--out is /none/out.jsonl, which cannot be written"),
        (["trainer.devices=3", "strategy.ep_size=2"], "strategy.ep_size is 2, allowed"),
    ],
)
def test_63_a_request_that_cannot_be_met_starts_no_rank(run_dir, monkeypatch, words, says):
    monkeypatch.setattr("scmoe.runs.continuation.start_ranks", lambda *_: pytest.fail("ranks are started"))
    words = [word.replace("PROMPTS", str(run_dir.parents[1] / "prompts.jsonl")) for word in words]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert call("generate", str(run_dir), *words) == 2
    assert says in err.getvalue() and err.getvalue().count("\n") == 1, err.getvalue()
