"""Parts of a page for files: tables of the paper, benches and other measurements. Advice has its
part in advice_part.py."""

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.report import Report, say
from scmoe.runs.html_report.advice_part import part_of_advice
from scmoe.runs.html_report.marks import Mark, draw_rows, pair
from scmoe.runs.html_report.page_parts import (
    Part,
    Picture,
    Table,
    keys_of,
    number,
    value_of,
    without_empty_columns,
)
from scmoe.runs.html_report.run_curves import Line, draw_losses
from scmoe.runs.html_report.sources import Source, Sources, listed_tables, rows_by_name

OURS = {"color": "c1", "text": "ours"}
PAPER = {"color": "c2", "text": "paper"}
KINDS = {"train": ("training", "c1"), "forward": ("inference", "c3")}


def parts_of_files(sources: Sources) -> list[Part]:
    """Return a part for each file, below a heading for each kind."""
    chapters = {
        "advice": ("Would it pay?", part_of_advice),
        "table": ("Results beside the paper's", part_of_table),
        "speeds": ("Speed-ups", part_of_speeds),
        "training": ("Trainings on one network", part_of_training),
        "measurements": ("Measurements", part_of_measurements),
    }
    parts = []
    for kind, (title, make) in chapters.items():
        chapter = []
        for number_of_kind, source in enumerate(sources.of_kind(kind), 1):
            try:
                part = make(source, f"{kind}-{number_of_kind}")
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                what = f"{source.path} looks like {kind}, but is not whole"
                why = f"{type(error).__name__}: {error}"
                if source.named:
                    raise ConfigError(
                        f"{what} ({why}). Write it again, or leave it out."
                    ) from error
                say(f"{what} ({why}): it is left out")
                continue
            state_conditions(part, source.conditions)
            chapter.append(part)
        if chapter:
            parts += [Part(title, kind), *chapter]
    return parts


def state_conditions(part: Part, conditions: Mapping[str, str]) -> None:
    """Add date, machine, command and reading, as far as they are known."""
    part.facts += [(key, conditions[key]) for key in ("date", "machine") if key in conditions]
    if "command" in conditions:
        part.commands = [conditions["command"]]
    if "reading" in conditions:
        part.paragraphs.insert(0, plain(conditions["reading"]))


def plain(markdown: str) -> str:
    """Return a sentence of Markdown without its links and marks."""
    return re.sub(r"[`*]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown))


def part_of_table(source: Source, anchor: str) -> Part:
    """Return a table of the paper: differences from the baseline, the paper's beside ours."""
    data = source.data
    metric, form = data["metric"], "{:.2f}" if data["unit"] == "%" else "{:.4f}"
    part = Part(source.name, anchor, level=3)
    facts = (data.get("model"), data.get("data"), data.get("seen"))
    better = data["metrics"][metric]["better"]
    setting = "; ".join(str(fact) for fact in facts if fact)
    meaning = f"The metric is {metric} in {data['unit']}; {better} is better."
    part.paragraphs = [f"Scale {data['scale']}: {setting}. {meaning}"]
    marks: dict[str, list[Mark]] = {}
    for row in data["rows"]:
        minus, printed = row.get("minus_baseline"), row["paper"].get("difference")
        if minus and minus.get("mean") is not None:
            text = f"ours {minus['mean']:+.4g}"
            marks[row["name"]] = [Mark(minus["mean"], "c1", text, minus["low"], minus["high"])]
            if printed is not None:
                marks[row["name"]].append(Mark(printed, "c2", f"paper {printed:+.4g}", shape="D"))
    if marks:
        caption = f"{metric} minus that of the baseline, with intervals that hold together at 95 %"
        axis = f"{metric} minus the baseline's, {data['unit']}"
        part.pictures = [Picture(caption, draw_rows(marks, axis, caption, reference=0.0))]
        part.keys = [OURS, PAPER] if any(len(row) > 1 for row in marks.values()) else [OURS]
    part.tables = [Table(TABLE_HEADINGS, [table_cells(row, metric, form) for row in data["rows"]])]
    others = [name for name in data["metrics"] if name != metric]
    if others:
        cells = [[row["name"], *(beside(row, name) for name in others)] for row in data["rows"]]
        title = "Other metrics, the paper's value then ours"
        part.tables.append(Table(["row", *others], cells, title))
    return part


TABLE_HEADINGS = [
    "row",
    "paper",
    "ours: mean ± std (n)",
    "paper: minus baseline",
    "ours",
    "interval",
    "p",
]


def table_cells(row: Mapping[str, Any], metric: str, form: str) -> list[str]:
    signed = form.replace(":", ":+")
    ours, minus = row["ours"], row.get("minus_baseline") or {}
    spread = ""
    if ours.get("mean") is not None:
        deviation = "" if ours.get("std") is None else f" ± {form.format(ours['std'])}"
        spread = f"{form.format(ours['mean'])}{deviation} ({ours['n']})"
    ends = [minus.get("low"), minus.get("high")]
    return [
        row["name"],
        value_of(row["paper"], metric, form),
        spread,
        value_of(row["paper"], "difference", signed) if minus else "",
        value_of(minus, "mean", signed),
        " to ".join(signed.format(end) for end in ends) if None not in ends else "",
        value_of(minus, "p", "{:.3f}"),
    ]


def beside(row: Mapping[str, Any], name: str) -> str:
    """Return the paper's value of another metric, and ours."""
    ours = row.get("others", {}).get(name, {}).get("ours", {})
    printed = value_of(row["paper"], name, "{:g}") or "–"
    return f"{printed}; {value_of(ours, 'mean', '{:.2f}') or '–'}"


def part_of_speeds(source: Source, anchor: str) -> Part:
    """Return speed-ups over sequential top-2 with quartiles, limits and the paper's values."""
    data, rows = source.data, source.data["rows"]
    part = Part(source.name, anchor, level=3)
    printed = rows_by_name(data.get("paper"))
    marks: dict[str, list[Mark]] = {}
    for name, row in rows.items():
        marks[name] = []
        for kind, (word, color) in KINDS.items():
            speed, quartiles = row.get(f"{kind}_speedup"), row.get(f"{kind}_quartiles")
            if speed is not None:
                low, high = pair(quartiles)
                marks[name].append(Mark(speed, color, f"{word} {speed:.2f}", low, high))
            paper = printed.get(name, {}).get(kind)
            if paper is not None:
                text = f"{word}, paper {paper:.2f}"
                marks[name].append(
                    Mark(paper, "c2" if kind == "train" else "muted", text, shape="D")
                )
    caption = f"Speed-up over sequential top-2, quartiles of {data.get('rounds', '?')} rounds"
    part.pictures = [Picture(caption, draw_rows(marks, "speed-up", caption, reference=1.0))]
    part.keys = [{"color": color, "text": word} for word, color in KINDS.values()]
    if printed:
        part.keys += [
            {"color": "c2", "text": "training, paper"},
            {"color": "muted", "text": "inference, paper"},
        ]
    part.paragraphs = [setting_of(data)]
    part.tables = [speeds_table(rows, printed)]
    return part


def setting_of(data: Mapping[str, Any]) -> str:
    """Return in a sentence what a report of speed-ups has measured, as far as it says so."""
    forms = {
        "level": "level {level}",
        "ranks": "{ranks} ranks",
        "compute": "{compute} compute",
        "link_mbit": "links of {link_mbit:.0f} Mbit/s",
        "comm_share": "{comm_share:.0%} of top-2's inference is communication",
        "limit_train": "at most {limit_train:.2f} in training with all communication hidden",
        "limit_forward": "at most {limit_forward:.2f} in inference",
        "paper_source": "{paper_source}",
    }
    return "; ".join(form.format(**data) for key, form in forms.items() if data.get(key))


def speeds_table(rows: Mapping[str, Any], printed: Mapping[str, Any]) -> Table:
    headings, cells = ["row"], [[name] for name in rows]
    for kind, (word, _) in KINDS.items():
        headings += [f"{word}, ms", f"{word}, speed-up", "quartiles", "paper"]
        for line, (name, row) in zip(cells, rows.items(), strict=True):
            ends = row.get(f"{kind}_quartiles") or []
            line += [
                value_of(row, f"{kind}_ms", "{:.1f}"),
                value_of(row, f"{kind}_speedup", "{:.2f}"),
                " to ".join(f"{end:.2f}" for end in ends),
                value_of(printed.get(name, {}), kind, "{:.2f}"),
            ]
    return Table(*without_empty_columns(headings, cells))


def part_of_training(source: Source, anchor: str) -> Part:
    """Return a report of trainings that take turns on one network: speed-ups and losses."""
    rows = source.data["rows"]
    part = Part(source.name, anchor, level=3)
    marks = {}
    for name, row in rows.items():
        low, high = pair(row.get("quartiles"))
        marks[name] = [Mark(row["speedup"], "ink", f"{row['speedup']:.2f}", low, high)]
    caption = "Speed-up over sequential top-2, with quartiles"
    part.pictures = [Picture(caption, draw_rows(marks, "speed-up", caption, reference=1.0))]
    lines = [Line(name, i) for i, name in enumerate(rows)]
    caption = "Validation loss over seconds of training on this network"
    losses = [[(s, loss) for s, loss in row["val_losses"]] for row in rows.values()]
    part.pictures.append(Picture(caption, draw_losses(lines, losses, "seconds", caption)))
    part.keys = keys_of(lines)
    part.tables = [flat_table(rows)]
    return part


def part_of_measurements(source: Source, anchor: str) -> Part:
    """Return the tables of any other report."""
    data = source.data
    part = Part(source.name, anchor, level=3)
    listed = listed_tables(data)
    if "tables" in data and listed:
        for table in listed:
            for form in table["columns"].values():
                refuse_form(form)
            report = Report(**table)
            title = plain(report.title.rstrip(":"))
            headings = [report.first, *report.columns]
            part.tables.append(Table(list(map(plain, headings)), report.cells(), title))
    elif listed:  # the cells of a simulation
        part.tables = [flat_table({str(i): row for i, row in enumerate(listed, 1)}, "cell")]
    else:
        part.tables = [flat_table(data["rows"])]
    return part


def refuse_form(form: str) -> None:
    """Raise ValueError if the format of a cell does more than to pick a value and round it."""
    for _, name, spec, _ in Formatter().parse(form):
        picks_attribute = "." in re.sub(r"\[[^\]]*\]", "", name or "")
        if picks_attribute or re.search(r"[{}]|\d{3}", spec or ""):
            raise ValueError(f"the format {form!r} does more than to round a value")


def flat_table(rows: Mapping[str, Mapping[str, Any]], first: str = "row") -> Table:
    """Return a table with a column for each number or text at any depth of the rows."""
    flat = {name: dict(leaves(row)) for name, row in rows.items()}
    columns = list(dict.fromkeys(key for row in flat.values() for key in row))
    cells = [[name, *(row.get(key, "") for key in columns)] for name, row in flat.items()]
    return Table([first, *(key.replace("_", " ") for key in columns)], cells)


def is_nested(value: Any) -> bool:
    """Return whether a value is a list of lists, which is no cell of a table."""
    return isinstance(value, list) and any(isinstance(part, list) for part in value)


def leaves(row: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return dotted keys and values of a tree; a list of numbers stays one value."""
    pairs = []
    for key, value in row.items():
        if isinstance(value, dict):
            pairs += leaves(value, f"{before}{key}, ")
        elif value is not None and not is_nested(value):
            pairs.append((before + key, number(value)))
    return pairs
