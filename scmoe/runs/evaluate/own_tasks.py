"""Makes two tasks from held-out text that a small model can do: choose the last word, or the next sentence.

    cloze           which of four words ends the sentence? All four end sentences of the text and are about equally
                    frequent in it, so that knowing frequent words does not help
    next_sentence   which of four sentences comes next? All four are from the text, and about as long

Both are a function of the text alone: choices are drawn by a generator that is seeded with the question.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from scmoe.config.leaves import ConfigError
from scmoe.runs.evaluate.tasks import Question, Task

CHOICES, NEAR = 4, 12  # the other choices are drawn among this many neighbours on either side
MOST_CHARS = 10_000_000  # of a text; more would only take time
MOST_QUESTIONS = 500
WORDS = range(6, 41)  # of a sentence
END = re.compile(r"(.*\s)([a-z]{3,})[.!?]", re.DOTALL)


def sentences_of(documents: Sequence[str]) -> list[list[str]]:
    """Return the sentences of each document, in order, with single spaces."""
    kept, chars = [], 0
    for document in documents:
        flat = " ".join(document[: MOST_CHARS - chars].split())
        kept.append(re.split(r"(?<=[.!?]) (?=[A-Z])", flat))
        chars += len(flat)
    return kept


def cloze(documents: Sequence[str], origin: str) -> Task:
    """Return questions that ask for the last word of a sentence, given the rest of it and the sentence before."""
    texts = sentences_of(documents)
    often = Counter(word for text in texts for sentence in text for word in re.findall("[a-z]+", sentence))
    found = [
        (f"{before} {end[1].rstrip()}", end[2])
        for text in texts
        for before, sentence in pairwise(text)
        if len(sentence.split()) in WORDS and (end := END.fullmatch(sentence))
    ]
    ranked = sorted({word for _, word in found}, key=lambda word: (often[word], word))
    return _task("cloze", found, ranked, "acc", origin)


def next_sentence(documents: Sequence[str], origin: str) -> Task:
    """Return questions for the sentence after two others.

    Judged by how much likelier a sentence becomes through what is before it (lm-eval's acc_mutual_info): some sentences
    are likelier than others anywhere.
    """
    found = [
        (f"{first} {second}", third)
        for text in sentences_of(documents)
        for first, second, third in zip(text, text[1:], text[2:], strict=False)
        if all(len(sentence.split()) in WORDS for sentence in (first, second, third))
    ]
    ranked = sorted({sentence for _, sentence in found}, key=lambda sentence: (len(sentence), sentence))
    return _task("next_sentence", found, ranked, "acc_mutual_info", origin)


OWN_TASKS = {"cloze": cloze, "next_sentence": next_sentence}


def _task(name: str, found: Sequence[tuple[str, str]], ranked: Sequence[str], metric: str, origin: str) -> Task:
    """Return a task of up to MOST_QUESTIONS pairs (context, true choice), evenly spread over the text.

    ranked: all choices, sorted so that similar ones are neighbours.
    """
    if len(ranked) < CHOICES:
        allowed = f"{CHOICES} or more different ones; give a longer text with --text, or leave the task out"
        raise ConfigError(f"{name} finds {len(ranked)} choices in {origin}, allowed: {allowed}")
    place, size = {choice: i for i, choice in enumerate(ranked)}, min(len(found), MOST_QUESTIONS)
    questions = []
    for context, true in (found[i * len(found) // size] for i in range(size)):
        draw, i = random.Random(f"{name} {context} {true}"), place[true]
        near = [choice for choice in ranked[max(0, i - NEAR) : i + NEAR + 1] if choice != true]
        choices = [true, *draw.sample(near, CHOICES - 1)]
        draw.shuffle(choices)
        questions.append(Question(context, tuple(choices), choices.index(true)))
    return Task(name, questions, metric, origin)
