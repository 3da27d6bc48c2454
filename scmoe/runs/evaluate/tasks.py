"""Multiple-choice tasks, read from a folder of JSON lines or made from held-out text.

A line of NAME.jsonl is one question, in one of two forms:

    {"query": "...", "choices": ["...", "..."], "gold": 1}
    {"context_options": ["...", "..."], "continuation": "...", "gold": 0}

In the second form (WinoGrande) the choices are the beginnings, and all have the same end.

Two tasks are made from text, so that a small model can do them. They are a function of the text
alone: choices are drawn by a generator that is seeded with the question.

    cloze           which of four words ends the sentence? All four end sentences of the text and
                    are about equally frequent in it, so that knowing frequent words does not help
    next_sentence   which of four sentences comes next? All four are from the text, and about as
                    long
"""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from scmoe.config.leaves import ConfigError

# The text between query and choice, as in lm-eval's tasks of these names. Others have a space.
PROMPTS = {"piqa": "Answer:", "arc_easy": "\nAnswer:", "boolq": "\nAnswer:"}
CHOICES = 4
NEAR = 12  # the other choices are drawn among this many neighbours on either side
MOST_CHARS = 10_000_000  # of a text; more would only take time
MOST_QUESTIONS = 500
WORDS = range(6, 41)  # of a sentence
END = re.compile(r"(.*\s)([a-z]{3,})[.!?]", re.DOTALL)


class Question(NamedTuple):
    """One question. Choices follow the context; if there is an end, they precede it.

    gold: index of the true choice.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    end: str | None = None


class Task(NamedTuple):
    """Questions of one form.

    metric: of lm-eval, by which the task is judged. origin: where the questions are from.
    """

    name: str
    questions: list[Question]
    metric: str
    origin: str

    @property
    def chance(self) -> float:
        """The expected accuracy of a guess."""
        return sum(1 / len(question.choices) for question in self.questions) / len(self.questions)

    @property
    def one_answer(self) -> float | None:
        """The accuracy of the best constant answer; None where choices differ between questions."""
        if len({question.choices for question in self.questions}) > 1:
            return None
        times = Counter(question.gold for question in self.questions)
        return max(times.values()) / len(self.questions)


class Registered(NamedTuple):
    """A task, a group or a tag of lm-eval, under its name there.

    loaded: what lm-eval's TaskManager returns, with the data.
    """

    name: str
    loaded: Any


def read_task(path: Path) -> Task:
    """Return the task of a file NAME.jsonl.

    Raises ConfigError if it cannot be read, or a line is no question.
    """
    try:
        with path.open(encoding="utf-8") as file:  # str.splitlines would cut a text at U+2028, too
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the task {path} cannot be read as UTF-8 text: {error}") from error

    prompt = PROMPTS.get(path.stem, "")
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            questions.append(question_of(json.loads(line), prompt))
        except (KeyError, TypeError, ValueError) as error:
            form = "A question is a JSON object with query, choices and gold."
            raise ConfigError(f"{path}, line {number}: {why_no_question(error)}. {form}") from error
    if not questions or len({question.end is None for question in questions}) > 1:
        raise ConfigError(
            f"{path} has {len(questions)} questions. It needs one or more, all of one form."
        )
    return Task(path.stem, questions, "acc", str(path))


def why_no_question(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: {error.msg} at character {error.pos + 1}"
    return "a value has another form" if isinstance(error, TypeError) else str(error)


def question_of(line: dict[str, Any], prompt: str) -> Question:
    """Return the question of a line. Raises ValueError, KeyError or TypeError if it is none."""
    if "context_options" in line:
        choices = tuple(line["context_options"])
        question = Question("", choices, int(line["gold"]), str(line["continuation"]))
    else:
        context = (line["query"] + prompt).rstrip(" ")
        choices = tuple(line["choices"])
        question = Question(context, choices, int(line["gold"]))
    are_texts = all(isinstance(choice, str) and choice for choice in choices)
    if len(choices) < 2 or not are_texts:
        raise ValueError("the choices are not two or more texts")
    if not 0 <= question.gold < len(choices):
        raise ValueError(f"gold is {question.gold}, allowed: 0 to {len(choices) - 1}")
    return question


def sentences_of(documents: Sequence[str]) -> list[list[str]]:
    """Return the sentences of each document, in order, with single spaces."""
    texts = []
    chars = 0
    for document in documents:
        flat = " ".join(document[: MOST_CHARS - chars].split())
        texts.append(re.split(r"(?<=[.!?]) (?=[A-Z])", flat))
        chars += len(flat)
    return texts


def cloze(documents: Sequence[str], origin: str) -> Task:
    """Return questions that ask for the last word of a sentence, given the rest of it and the
    sentence before."""
    texts = sentences_of(documents)
    frequency = Counter(
        word for text in texts for sentence in text for word in re.findall("[a-z]+", sentence)
    )
    pairs = [
        (f"{before} {end[1].rstrip()}", end[2])
        for text in texts
        for before, sentence in pairwise(text)
        if len(sentence.split()) in WORDS and (end := END.fullmatch(sentence))
    ]
    ranked = sorted({word for _, word in pairs}, key=lambda word: (frequency[word], word))
    return _task("cloze", pairs, ranked, "acc", origin)


def next_sentence(documents: Sequence[str], origin: str) -> Task:
    """Return questions that ask for the sentence after two others.

    They are judged by how much likelier a sentence becomes through what is before it (lm-eval's
    acc_mutual_info), because some sentences are likelier than others anywhere.
    """
    pairs = [
        (f"{first} {second}", third)
        for text in sentences_of(documents)
        for first, second, third in zip(text, text[1:], text[2:], strict=False)
        if all(len(sentence.split()) in WORDS for sentence in (first, second, third))
    ]
    sentences = {sentence for _, sentence in pairs}
    ranked = sorted(sentences, key=lambda sentence: (len(sentence), sentence))
    return _task("next_sentence", pairs, ranked, "acc_mutual_info", origin)


OWN_TASKS = {"cloze": cloze, "next_sentence": next_sentence}


def _task(
    name: str, pairs: Sequence[tuple[str, str]], ranked: Sequence[str], metric: str, origin: str
) -> Task:
    """Return a task of up to MOST_QUESTIONS pairs (context, true choice), evenly spread over the
    text.

    ranked: all choices, sorted so that similar ones are neighbours.
    """
    if len(ranked) < CHOICES:
        raise ConfigError(
            f"{name} finds {len(ranked)} different choices in {origin}, but needs {CHOICES} or"
            " more. Give a longer text with --text, or leave the task out."
        )
    rank = {choice: i for i, choice in enumerate(ranked)}
    size = min(len(pairs), MOST_QUESTIONS)
    questions = []
    for number in range(size):
        context, true = pairs[number * len(pairs) // size]
        draw = random.Random(f"{name} {context} {true}")
        i = rank[true]
        near = [choice for choice in ranked[max(0, i - NEAR) : i + NEAR + 1] if choice != true]
        choices = [true, *draw.sample(near, CHOICES - 1)]
        draw.shuffle(choices)
        questions.append(Question(context, tuple(choices), choices.index(true)))
    return Task(name, questions, metric, origin)
