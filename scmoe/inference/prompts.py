"""Reads prompts from JSON lines: {"prompt": "My fellow citizens", "seed": 7}. The seed may be left
out."""

import json
from pathlib import Path
from typing import NamedTuple


class Prompt(NamedTuple):
    """text: None: a document's beginning. seed: of the random choices in its continuation."""

    text: str | None
    seed: int = 0


def read_prompts(path: Path, first_seed: int) -> list[Prompt]:
    """Return the prompts of a file; one without a seed gets first_seed + its number. ValueError:
    names the line."""
    try:
        with path.open(encoding="utf-8") as file:  # str.splitlines would cut a text at U+2028, too
            lines = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts {path} cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines):
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number + 1}: not JSON: {error}") from error
        known = isinstance(given, dict) and given.keys() <= {"prompt", "seed"}
        if (
            not known
            or not isinstance(given.get("prompt"), str)
            or type(given.get("seed", 0)) is not int
        ):
            form = '{"prompt": "a text"}, and a number as "seed" if wanted'
            raise ValueError(f"{path}, line {number + 1} is {line[:80]}, allowed: {form}")
        prompts.append(Prompt(given["prompt"], given.get("seed", first_seed + number)))
        check_prompt(prompts[-1], f"{path}, line {number + 1}:")
    if not prompts:
        raise ValueError(f"{path} is empty, allowed: one prompt a line, as JSON")
    return prompts


def check_prompt(prompt: Prompt, where: str) -> None:
    """Raise ValueError for a text that is empty or not Unicode, and for a seed that a generator
    does not take."""
    if prompt.text is not None and not prompt.text:
        raise ValueError(
            f"{where} the prompt is empty, allowed: a text, or no prompt to begin a document"
        )
    try:
        (prompt.text or "").encode()
    except (
        UnicodeEncodeError
    ) as error:  # half of a pair of surrogates, or bytes of the command line that are not UTF-8
        bad = f"the prompt's character {error.start + 1} is not Unicode, allowed: valid UTF-8"
        raise ValueError(f"{where} {bad}") from error
    if not 0 <= prompt.seed < 2**63:
        raise ValueError(f"{where} the seed is {prompt.seed}, allowed: 0 to 2^63 - 1")
