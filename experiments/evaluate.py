"""`scmoe evaluate` scores a run's model."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Column, Table

from scmoe.experiments.engine.command_line import call


def main(
    run: Path,
    /,
    *overrides: str,
    which: Literal["last", "best"] = "last",
    tasks: str | None = None,
    data: Path | None = None,
    text: Path | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> None:
    """Evaluate a checkpoint of a run: loss of the test split, perplexity of a text, tasks.

    The results go to RUN/evaluation.json and to the run's own W&B run. Standard output is the results as
    JSON. They do not depend on the number of ranks (trainer.devices=2).

    Args:
        run: a run's directory, such as runs/latest
        overrides: key=value, what a resumed run may change, too
        which: checkpoint
        tasks: comma-separated: cloze and next_sentence, made from the text, files of --data, tasks of lm-eval such as
            hellaswag; none (default: the first two)
        data: folder of NAME.jsonl for tasks, such as piqa.jsonl, or of lm-eval's YAML files
        text: UTF-8 file for perplexity and own tasks (default: the test split)
        stride: tokens that a window scores (default: half the context)
        limit: questions of a task, the first ones (default: all)
    """
    from scmoe.runs.evaluate.evaluation import Request, evaluate
    from scmoe.training.run.printout import console

    names = None if tasks is None else () if tasks == "none" else tuple(tasks.split(","))
    found = evaluate(run.resolve(), Request(which, names, data, text, stride, limit, overrides))
    if found is not None:
        console().print(f"the {which} checkpoint, {found['checkpoint']}", *shown(found), sep="\n")
        print(json.dumps(found), flush=True)


def shown(found: Mapping[str, Any]) -> list[str | Table]:
    """Return lines and a table that show the results of one evaluation, with their conditions."""
    test, text = found["test"], found["text"]
    rest = f"accuracy {test['accuracy']:.2%}" if "images" in test else f"{test['bits_per_byte']:.4f} bits per byte"
    number = f"{test['images']:,} images" if "images" in test else f"{test['tokens']:,} tokens"
    capacity = "dropless" if test["capacity_factor"] is None else f"capacity factor {test['capacity_factor']:g}"
    parts: list[str | Table] = [f"split {test['split']}: loss {test['loss']:.4f}, {rest} ({number}, {capacity})"]
    if text:
        how = f"window {text['window']}, stride {text['stride']}, dropless"
        parts.append(f"{text['text']}: perplexity {text['perplexity']:.2f} ({text['tokens']:,} tokens, {how})")
    if found["tasks"]:
        parts.append(tasks_table(found["tasks"]))
    return parts


def tasks_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    numbers = ("accuracy", "95 % interval", "chance", "one answer", "questions")
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    table = Table("task", *columns, Column(no_wrap=True), box=box.SIMPLE_HEAD, pad_edge=False)
    for name, task in tasks.items():
        interval = "" if task["interval"] is None else "{:.3f} to {:.3f}".format(*task["interval"])
        guesses = ("" if task[key] is None else f"{task[key]:.3f}" for key in ("chance", "one_answer"))
        questions = "" if task["questions"] is None else f"{task['questions']:,} of {task['of']:,}"
        table.add_row(name, f"{task['accuracy']:.3f}", interval, *guesses, questions, task["verdict"])
    return table


if __name__ == "__main__":
    sys.exit(call("evaluate", *sys.argv[1:]))
