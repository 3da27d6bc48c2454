"""Multiple-choice tasks as plain values, and how they are read from a folder of JSON lines; tasks of lm-eval.

A line of NAME.jsonl is one question, in one of two forms:

    {"query": "...", "choices": ["...", "..."], "gold": 1}
    {"context_options": ["...", "..."], "continuation": "...", "gold": 0}

In the second form (WinoGrande) the choices are the beginnings, and all have one end.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from scmoe.config.leaves import ConfigError

# What stands between query and choice, as in lm-eval's own tasks of these names; for others a space alone.
PROMPTS = {"piqa": "Answer:", "arc_easy": "\nAnswer:", "boolq": "\nAnswer:"}


class Question(NamedTuple):
    """Which of `choices` is the true one, `gold`? They follow the context; where there is an end, they precede it."""

    context: str
    choices: tuple[str, ...]
    gold: int
    end: str | None = None


class Task(NamedTuple):
    """Questions of one form. metric: of lm-eval, by which the task is judged. origin: where they are from."""

    name: str
    questions: list[Question]
    metric: str
    origin: str

    @property
    def chance(self) -> float:
        """The accuracy of a guess."""
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)

    @property
    def one_answer(self) -> float | None:
        """The accuracy of the best answer that is always the same; None where choices differ between questions."""
        if len({question.choices for question in self.questions}) > 1:
            return None
        return max(Counter(question.gold for question in self.questions).values()) / len(self.questions)


class Registered(NamedTuple):
    """A task, a group or a tag of lm-eval, under its own name. loaded: of lm-eval's TaskManager, with the data."""

    name: str
    loaded: Any


def read_task(name: str, folder: Path) -> Task:
    """Return the task of folder/NAME.jsonl. ConfigError: there is none, or a line is no question."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl"))) or "none"
        raise ConfigError(f"--tasks has {name!r}, allowed: cloze, next_sentence, or one of {folder}: {there}")
    questions = []
    with path.open(encoding="utf-8") as file:  # str.splitlines would cut a text at U+2028, too
        for number, line in enumerate(file, 1):
            try:
                questions.append(question_of(json.loads(line), PROMPTS.get(name, "")))
            except (KeyError, TypeError, ValueError) as error:
                allowed = "allowed: a JSON object with query, choices and gold"
                raise ConfigError(f"{path}, line {number}: {why_no_question(error)}, {allowed}") from error
    if not questions or len({question.end is None for question in questions}) > 1:
        raise ConfigError(f"{path} has {len(questions)} questions, allowed: one or more, all of one form")
    return Task(name, questions, "acc", str(path))


def why_no_question(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: {error.msg} at character {error.pos + 1}"
    return "a value has another form" if isinstance(error, TypeError) else str(error)


def question_of(line: dict[str, Any], prompt: str) -> Question:
    """Return the question of a line. ValueError, KeyError or TypeError: it is none."""
    if "context_options" in line:
        question = Question("", tuple(line["context_options"]), int(line["gold"]), str(line["continuation"]))
    else:
        question = Question((line["query"] + prompt).rstrip(" "), tuple(line["choices"]), int(line["gold"]))
    if len(question.choices) < 2 or not all(isinstance(choice, str) and choice for choice in question.choices):
        raise ValueError("the choices are not two or more texts")
    if not 0 <= question.gold < len(question.choices):
        raise ValueError(f"gold is {question.gold}, allowed: 0 to {len(question.choices) - 1}")
    return question
