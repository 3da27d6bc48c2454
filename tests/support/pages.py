"""This module reads the pages: README and docs, their fenced blocks and the commands in them."""

import os
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDES = [  # what a user copies from; results and decisions are records
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# a block of text may have commands that are not meant to be copied as they are
SHELL = ("bash", "text")
OF_SHELL = {"$level": "block", "$share": "0.52"}  # variables of the Makefile's loops


def blocks(page: Path | str, language: str) -> list[str]:
    """Return the fenced blocks of a page in this language, without their common indentation."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


def commands(page: Path | str) -> list[str]:
    """Return the lines of the blocks of bash of a page."""
    return [line for block in blocks(page, "bash") for line in block.splitlines()]


def all_commands(page: Path) -> list[str]:
    """Return the commands of a page: blocks of bash, lines `make ...` and `scmoe ...` of blocks of
    text."""
    lines = [line for block in blocks(page, "text") for line in block.splitlines()]
    return [*commands(page), *(line for line in lines if re.match(r"(make|scmoe) ", line))]


def program_of(command: str) -> list[str]:
    """Return the words of scmoe's command line that a command runs, through make, torchrun or
    sbatch; [] where it runs something else: pip, pytest, a script of docs/examples."""
    words = shlex.split(command)
    if words[0] == "make":
        environment = {
            name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "ARGS"))
        }
        dry = ["make", "--dry-run", *words[1:]]
        done = subprocess.run(
            dry, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
        )
        command = done.stdout.strip().splitlines()[-1].partition(" || exit")[0]
        for variable, text in OF_SHELL.items():
            command = command.replace(variable, text)
    if "train.sbatch" in command:
        start, _, overrides = command.partition("experiments/train.sbatch")
        run, config = (re.search(rf"{name}=(\S+)", start) for name in ("RUN", "CONFIG"))
        default = "configs/experiment/gpt2_moe_small.yaml"
        verb = ["resume", run[1]] if run else ["train", config[1] if config else default]
        return [*verb, *shlex.split(overrides)]
    found = re.search(r"(?:-m experiments\.|-m scmoe |(?:^|/)scmoe )(.*)", command)
    if not found:
        return []
    verb, *arguments = shlex.split(found[1])
    return [verb.replace("_", "-"), *arguments]
