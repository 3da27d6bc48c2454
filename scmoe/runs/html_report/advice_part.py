"""The part of a page for the advice of `scmoe advise`: its job, and each row's step, speed-ups,
answer and reason.

The answer rests on the speed-up over the best row of the standard model, with its interval, so that
one is drawn first. What an older file lacks is called "not stated".
"""

from collections.abc import Iterator, Mapping
from typing import Any

from scmoe.runs.html_report.marks import Mark, draw_rows, pair
from scmoe.runs.html_report.page_parts import (
    Part,
    Picture,
    Table,
    number,
    value_of,
    without_empty_columns,
)
from scmoe.runs.html_report.sources import Source

NOT_STATED = "not stated"
JOB = {  # keys of "job": what the page calls them
    "config": "config",
    "cluster": "cluster",
    "ranks": "ranks",
    "ep": "EP",
    "tokens": "tokens of a rank in a step",
    "batches": "batches of a step",
    "load": "load",
    "standard": "standard model",
    "share": "share of its step that waits for rows",
}
COLORS = {"over_best": "c2", "over_top2": "c1", "over_shared": "c3"}  # of a row's speed-ups
MORE = {  # further keys of a row: heading and format
    "over_shared": ("over shared expert", "{:.2f}"),
    "over_best_shared": ("over shared expert at its best", "{:.2f}"),
    "exposed_rows_ms": ("exposed rows, ms", "{:.1f}"),
    "exposed_gradients_ms": ("exposed gradients, ms", "{:.1f}"),
    "other_ms": ("other, ms", "{:.1f}"),
    "slot": ("slot", "{}"),
    "chunks": ("chunks", "{}"),
    "memory_gib": ("memory, GiB", "{:.1f}"),
}
FITS = {True: "yes", False: "no", None: NOT_STATED}


def part_of_advice(source: Source, anchor: str) -> Part:
    """Return the part of a report of `scmoe advise`."""
    rows = source.data["rows"]
    job = {"standard": source.data.get("standard"), **source.data.get("job", {})}
    standard = job["standard"] or "the standard model"
    part = Part(title_of(job) or source.name, anchor, level=3)
    part.facts = [(words, stated(key, job.get(key))) for key, words in JOB.items()]
    basis = (
        f"An answer rests on the speed-up over {standard} at its best, with its interval. Rows of"
        f" {standard} itself are compared with its sequential one. Everything is predicted."
    )
    part.paragraphs = [basis]
    steps = {label(name, row): [*steps_of(row)] for name, row in rows.items()}
    if any(steps.values()):
        caption = "Predicted time of a step with its interval"
        part.pictures = [Picture(caption, draw_rows(steps, "ms a step", caption))]
    over = over_what(standard)
    speed_ups = {label(name, row): [*speed_ups_of(row, over)] for name, row in rows.items()}
    if any(speed_ups.values()):
        caption = "Predicted speed-ups with their intervals"
        picture = draw_rows(speed_ups, "speed-up", caption, reference=1.0)
        part.pictures.append(Picture(caption, picture))
        part.keys = [{"color": COLORS[key], "text": words} for key, words in over.items()]
    part.tables = [answers(rows, over["over_best"]), further(rows, over["over_top2"])]
    return part


def title_of(job: Mapping[str, Any]) -> str:
    """Return which config on which cluster the advice is for; "" where it does not say so."""
    if "config" in job and "cluster" in job:
        return f"{job['config']} on cluster {job['cluster']}"
    return ""


def stated(key: str, value: Any) -> str:
    """Return a fact of the job for a reader."""
    if value is None:
        return NOT_STATED
    return f"{value:.0%}" if key == "share" else number(value)


def over_what(standard: str) -> dict[str, str]:
    """Return over what the speed-ups of a row are, in words, the one of the answer first."""
    return {
        "over_best": f"over {standard} at its best",
        "over_top2": f"over {standard}, sequential",
        "over_shared": "over shared expert",
    }


def label(name: str, row: Mapping[str, Any]) -> str:
    """Return a row's name in a drawing."""
    return f"{name} (does not fit the card)" if row.get("fits") is False else name


def steps_of(row: Mapping[str, Any]) -> Iterator[Mark]:
    """Yield the step's time, if it is known."""
    value = row.get("step_ms")
    if isinstance(value, int | float):
        low, high = pair(row.get("interval"))
        text = f"{value:.1f} ms" + (f", {low:.1f} to {high:.1f}" if low is not None else "")
        yield Mark(value, "c1", text, low, high)


def speed_ups_of(row: Mapping[str, Any], over: Mapping[str, str]) -> Iterator[Mark]:
    """Yield a row's speed-ups, with their intervals as far as they are known."""
    for key, words in over.items():
        value = row.get(key)
        if isinstance(value, int | float):
            low, high = pair(row.get(f"{key}_interval"))
            yield Mark(value, COLORS[key], f"{words}: {value:.2f}", low, high)


def answers(rows: Mapping[str, Any], over_best: str) -> Table:
    """Return each row's answer with the interval on which it rests, and the reason."""
    headings = ["row", "answer", over_best, "its interval", "step, ms"]
    headings += ["step's interval", "why"]
    cells = [
        [
            name,
            row["answer"] + (", does not fit" if row.get("fits") is False else ""),
            value_of(row, "over_best", "{:.2f}") or NOT_STATED,
            between(row.get("over_best_interval"), "{:.2f}"),
            value_of(row, "step_ms", "{:.1f}"),
            between(row.get("interval"), "{:.1f}"),
            str(row.get("why", "")),
        ]
        for name, row in rows.items()
    ]
    return Table(headings, cells, wordy=(1, len(headings) - 1), answers=1)


def between(interval: Any, form: str) -> str:
    """Return the two ends of an interval, in words."""
    ends = [form.format(end) for end in pair(interval) if end is not None]
    return " to ".join(ends) or NOT_STATED


def further(rows: Mapping[str, Any], over_sequential: str) -> Table:
    """Return the other figures of each row."""
    headings = ["row", over_sequential, *(words for words, _ in MORE.values()), "fits the card"]
    cells = [
        [
            name,
            value_of(row, "over_top2", "{:.2f}"),
            *(value_of(row, key, form) for key, (_, form) in MORE.items()),
            FITS[row.get("fits")],
        ]
        for name, row in rows.items()
    ]
    return Table(*without_empty_columns(headings, cells))
