"""Shows the answers: a table, what each failure looks like and a script that shows it, and JSON."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from scmoe.conform.equality import Difference
from scmoe.conform.exam import FAILURES, PLACE_ALONE, PLACES, Answer, Answers, Exam
from scmoe.conform.questions import FIRST_QUESTIONS, OTHERS
from scmoe.report import console

ANSWER_STYLES = {"passed": "green", "failed": "bold red", "not asked": "dim"}


@contextmanager
def progress(total: int) -> Iterator[Callable[[str, str], None]]:
    """Show a bar. What this yields is called with place and question before each."""
    screen = console()
    bar = Progress(console=screen, transient=True, disable=not screen.is_terminal)
    with bar:
        task = bar.add_task("ranks start", total=total)

        def advance(place: str, name: str) -> None:
            bar.update(task, advance=1, description=f"{heading(place)}: {name}")

        yield advance


def heading(place: str) -> str:
    if place == "2x2":
        return "EP 2 x DP 2"
    return "1 rank" if place == PLACE_ALONE else f"{place} ranks"


def show(exam: Exam, answers: Answers) -> None:
    """Print the table, a line for each failure and a script for the first, on standard error."""
    table = Table(
        Column("question"),
        *map(heading, exam.places),
        title=Text(f"{exam.source}, {exam.dtype}"),
        title_justify="left",
    )
    for name, of_places in answers.items():
        table.add_row(Text(name), *(_cell(answer) for answer in of_places.values()))
    screen = console()
    screen.print(table)
    for line in [*failure_lines(answers), *unasked_lines(answers)]:
        screen.print(Text(line))
    scripts = reproducers(exam, answers)
    for name, script in [*scripts.items()][:1]:
        screen.print(Text(f"\nThis script shows the first failure ({name}):\n\n{script}"))


def _cell(answer: Answer) -> Text:
    ratio = "" if answer.ratio is None else f" x {answer.ratio:.4g}"
    return Text(answer.answer + ratio, ANSWER_STYLES.get(answer.answer, "bold red"))


def failure_lines(answers: Answers) -> list[str]:
    """Return a line for each failure, about the first number of ranks where a question failed.
    Questions with the same failure have one line."""
    names: dict[str, list[str]] = {}
    for name, of_places in answers.items():
        failed = [(ranks, a) for ranks, a in of_places.items() if a.answer in FAILURES]
        for ranks, answer in failed[:1]:
            names.setdefault(f"{heading(ranks)}: {said(answer)}", []).append(name)
    return [f"{', '.join(names[line])}; {line}" for line in names]


def unasked_lines(answers: Answers) -> list[str]:
    """Return a line for each reason why something was not asked."""
    reasons: dict[str, list[str]] = {}
    for name, of_places in answers.items():
        for answer in of_places.values():
            names = reasons.setdefault(answer.why, []) if answer.answer == "not asked" else []
            if name not in names:
                names.append(name)
    return [f"not asked, as {why}: {', '.join(names)}" for why, names in reasons.items()]


def reproducers(exam: Exam, answers: Answers) -> dict[str, str]:
    """Return by question a script that prints a number that is wrong."""
    plays = {question.name: question.play for question in (*FIRST_QUESTIONS, *OTHERS)}
    scripts = {}
    for name, of_places in answers.items():
        for ranks, answer in of_places.items():
            difference = answer.difference
            # why: it has another shape, or no rank has it, so there is no number to print
            if difference is None or difference.why or name not in plays or name in scripts:
                continue
            scripts[name] = reproducer(exam, ranks, plays[name], difference)
    return scripts


def said(answer: Answer) -> str:
    """Return what was seen, in a sentence."""
    difference = answer.difference
    if difference is None:
        return answer.why if answer.answer == "not asked" else f"{answer.answer}: {answer.why}"
    tensor = f"{answer.why}{difference.name}, rank {difference.rank}"
    if difference.why:
        return f"{tensor}: {difference.why}"
    ratio = "" if difference.ratio is None else f", {difference.ratio:.6g} times"
    return (
        f"{tensor}, element {[*difference.element]}: {difference.value:.9g}{ratio},"
        f" where {difference.expected:.9g} is right"
    )


def has_failed(answers: Answers) -> bool:
    return any(a.answer in FAILURES for of_places in answers.values() for a in of_places.values())


def reproducer(exam: Exam, place: str, play: str, difference: Difference) -> str:
    """Return a script that prints the number that differs, under torchrun."""
    size, ep_size = PLACES[place]
    return f"""\
# torchrun --standalone --nproc-per-node={size} reproduce.py
import torch
from scmoe.conform.plays import PLAYS, Seat
from scmoe.conform.rank_pool import join
from scmoe.conform.source import make_of

seat = Seat(make_of({exam.source!r}), join(ep_size={ep_size}), torch.{exam.dtype})
record = PLAYS[{play!r}](seat)
if seat.group.rank == {difference.rank}:
    number = record[{difference.name!r}][{difference.element}].item()
    print(number, "where {difference.expected!r} is right")
"""


def as_json(exam: Exam, answers: Answers) -> dict[str, Any]:
    """Return everything that was answered; with a script for each failure that has one."""
    questions = {
        name: {ranks: _entry(answer) for ranks, answer in of_places.items()}
        for name, of_places in answers.items()
    }
    return {
        "layer": exam.source,
        "dtype": exam.dtype,
        "passed": not has_failed(answers),
        "questions": questions,
        "reproducers": reproducers(exam, answers),
    }


def _entry(answer: Answer) -> dict[str, Any]:
    entry: dict[str, Any] = {"answer": answer.answer, "ratio": answer.ratio}
    if answer.answer != "passed":
        entry["why"] = said(answer)
    return entry
