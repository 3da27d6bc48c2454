"""Every verb answers --help quickly, under the name it was called by, and leaves no files; a typo is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scmoe.experiments import VERBS

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "matplotlib", "wandb", "lightning", "scipy", "optuna")
# This code is put before a program. When the program ends, it prints which heavy packages were imported.
WATCHED = f"""
import atexit, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
atexit.register(lambda: print("imported:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr))
"""
AS_MODULE = WATCHED + "runpy.run_module(f'experiments.{sys.argv[1]}', run_name='__main__', alter_sys=True)"
AS_SCMOE = WATCHED + "from scmoe.experiments import main; sys.argv[0] = '/somewhere/bin/scmoe'; main()"
SUBVERBS = [("bench", what) for what in ("layer", "overlap", "growth", "guard", "generation", "inference", "timeline")]
SUBVERBS += [("faults", what) for what in ("kill", "flip", "resume", "reshard")]


def run(program: str, words: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    if program == AS_MODULE:
        words = words[0].replace("-", "_"), *words[1:]
        program = program.replace("runpy.run_module", "verb, sys.argv = sys.argv[1], sys.argv[1:]; runpy.run_module")
        program = program.replace("{sys.argv[1]}", "{verb}")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [*((verb,) for verb in VERBS), *SUBVERBS], ids=" ".join)
def test_help_imports_no_heavy_package_and_shows_the_name_it_was_called_by(words, tmp_path):
    for program, name in ((AS_MODULE, "python -m experiments."), (AS_SCMOE, "scmoe ")):
        done = run(program, (*words, "--help"), tmp_path)
        assert done.returncode == 0, done.stderr
        called = " ".join(words).replace("-", "_" if program == AS_MODULE else "-")
        assert done.stdout.startswith(f"usage: {name}{called} ")
        assert done.stderr == "imported:\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [verb for verb in VERBS])
def test_an_unknown_argument_is_an_error(verb, tmp_path):
    done = run(AS_MODULE, (verb, "--no-such-option"), tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert not list(tmp_path.iterdir())


def test_scmoe_lists_its_verbs(tmp_path):
    done = run(AS_SCMOE, (), tmp_path)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == list(VERBS)
    assert run(AS_SCMOE, ("tarin",), tmp_path).returncode == 2


def test_every_verb_is_a_script():
    assert {path.stem for path in (ROOT / "experiments").glob("*.py")} == {
        "__init__",
        *(verb.replace("-", "_") for verb in VERBS),
    }
