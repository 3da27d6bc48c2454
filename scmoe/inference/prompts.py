"""Prompts in JSON lines: {"prompt": "My fellow citizens", "seed": 7}. The seed is optional."""

import json
from pathlib import Path
from typing import NamedTuple


class Prompt(NamedTuple):
    """A text to continue.

    text: None: a document's beginning. seed: of the random choices in its continuation.
    """

    text: str | None
    seed: int = 0


def read_prompts(path: Path, first_seed: int) -> list[Prompt]:
    """Return the prompts of a file. One without a seed gets first_seed + its line's number from 0.

    Raises ValueError, which names the line.
    """
    try:
        with path.open(encoding="utf-8") as file:  # str.splitlines would cut a text at U+2028, too
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts {path} cannot be read: {error}") from error

    prompts = []
    for number, line in enumerate(lines):
        where = f"{path}, line {number + 1}"
        prompt = parsed(line, first_seed + number, where)
        check_prompt(prompt, f"{where}:")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} is empty. Write one prompt a line, as JSON.")
    return prompts


def parsed(line: str, seed: int, where: str) -> Prompt:
    """Return the prompt of a line. seed: of a prompt that names none. Raises ValueError for a line
    of another form."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if (
        not isinstance(entry, dict)
        or not entry.keys() <= {"prompt", "seed"}
        or not isinstance(entry.get("prompt"), str)
        or type(entry.get("seed", 0)) is not int
    ):
        raise ValueError(
            f'{where} is {line[:80]}. Write {{"prompt": "a text"}}, and a number as "seed" if you'
            " want one."
        )
    return Prompt(entry["prompt"], entry.get("seed", seed))


def check_prompt(prompt: Prompt, where: str) -> None:
    """Raise ValueError for a text that is empty or not Unicode, and for a seed that a generator
    does not take."""
    if prompt.text is not None and not prompt.text:
        raise ValueError(
            f"{where} the prompt is empty. Give a text, or no prompt to begin a document."
        )
    try:
        (prompt.text or "").encode()
    except UnicodeEncodeError as error:
        # half of a pair of surrogates, or bytes of the command line that are not UTF-8
        raise ValueError(
            f"{where} the prompt's character {error.start + 1} is not Unicode. Give valid UTF-8."
        ) from error
    if not 0 <= prompt.seed < 2**63:
        raise ValueError(f"{where} the seed is {prompt.seed}, allowed: 0 to 2^63 - 1")
