"""The parts of a page, as the template shows them, and how runs and files become parts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from typing import Any

from markupsafe import Markup

from scmoe.config.leaves import ConfigError
from scmoe.files import read_json
from scmoe.report import in_one_line
from scmoe.runs.html_report.layer_timelines import plan_drawings, trace_drawing, trace_drawings
from scmoe.runs.html_report.run_curves import Line, load_drawings, loss_drawings, read_loads
from scmoe.runs.html_report.sources import COMMIT, Cleaner, Sources
from scmoe.runs.seen import SeenRun, differing_fields

STAMP = 15  # letters of the date and time that a run's name begins with
SHOWN = 4  # drawings of one kind; more are folded
SUMMARY = {  # keys of summary.json that the page shows, by what they are called there
    "val_loss": "validation loss",
    "perplexity": "perplexity",
    "val_accuracy": "accuracy",
    "tokens_per_s": "tokens/s",
    "images_per_s": "images/s",
    "model_tflops": "TFLOP/s of a device",
    "mfu": "MFU",
    "peak_host_gib": "peak memory of the host, GiB",
    "peak_device_gib": "peak memory of a GPU, GiB",
    "params_total": "parameters",
    "params_active": "active parameters",
    "world_size": "ranks",
    "ep_size": "EP",
    "load_max_ratio": "busiest expert, validation",
    "drop_share": "dropped copies, validation",
}
SHARES = ("drop_share", "mfu", "val_accuracy")  # keys of summary.json that are shown as per cent
SECONDS = (
    "Seconds are those of training steps, without validation and checkpoints: tokens over the"
    " logged speeds, added up."
)


@dataclass(frozen=True)
class Picture:
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """A table of the page. Columns of numbers stand at the right.

    wordy: the other columns, beside the first. answers: the column of `scmoe advise`'s answers.
    links: an anchor for each row. A table with columns of words becomes a list of cards on a phone.
    """

    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    title: str = ""
    wordy: Sequence[int] = ()
    answers: int = -1
    links: Sequence[str] = ()


@dataclass
class Part:
    """A heading with what stands below it. facts: name and value. keys: colour and meaning of a
    legend, lines for curves. level: of the heading."""

    title: str
    anchor: str
    level: int = 2
    in_contents: bool = True
    paragraphs: list[str] = field(default_factory=list)
    keys: list[dict[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    folded: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    text: str = ""  # shown as it is, folded
    text_title: str = ""

    def draw(self, drawings: Sequence[tuple[str, Markup]]) -> None:
        """Show the first drawings and fold the others."""
        pictures = [Picture(caption, svg) for caption, svg in drawings]
        self.pictures += pictures[:SHOWN]
        self.folded += pictures[SHOWN:]


OPERATOR_KEYS = [
    {"color": color, "text": name}
    for color, name in (
        ("c1", "attention"),
        ("c6", "mlp"),
        ("c3", "shared expert"),
        ("c5", "experts"),
        ("c2", "dispatch"),
        ("c4", "combine"),
        ("muted", "route, encode, decode"),
    )
]
LOAD_KEYS = [{"gradient": "yes", "text": "0, the fair share, 2 x and more"}]


def parts_of_runs(sources: Sources, clean: Cleaner) -> list[Part]:
    """Return an overview of all runs, the losses of each experiment, and each run."""
    if not sources.runs:
        return []
    runs = sources.runs
    names = {run.path: clean("/".join(run.path.parts[-2:])) for run in runs}
    parts = [overview(runs, names, clean)]
    by_folder = sorted(runs, key=lambda run: str(run.path.parent))
    for number, (folder, members) in enumerate(groupby(by_folder, lambda run: run.path.parent), 1):
        parts += losses(clean(folder.name), f"losses-{number}", [*members], names, clean)
    for number, run in enumerate(runs, 1):
        parts += parts_of_run(run, names[run.path], f"run-{number}", clean)
    return parts


def overview(runs: Sequence[SeenRun], names: Mapping[Any, str], clean: Cleaner) -> Part:
    fields = differing_fields(runs)
    cells = []
    for run in runs:
        curve = run.curve("val/loss")
        cells.append(
            [
                names[run.path],
                run.state,
                f"{run.steps:,} of {run.max_steps:,}",
                "" if run.best_loss is None else f"{run.best_loss:.4f}",
                f"{curve[-1][1]:.4f}" if curve else "",
                f"{run.per_s:,.0f} {run.counts}/s" if run.per_s else "",
                clean(fields[run]),
            ]
        )
    headings = ["run", "state", "steps", "best val. loss", "last val. loss", "speed", "differs in"]
    links = [f"run-{number}" for number in range(1, len(runs) + 1)]
    return Part("Runs", "runs", tables=[Table(headings, cells, wordy=(1, 6), links=links)])


def losses(
    title: str, anchor: str, runs: Sequence[SeenRun], names: Mapping[Any, str], clean: Cleaner
) -> list[Part]:
    """Return the losses of the runs of one folder; none where nothing was logged."""
    fields = differing_fields(runs)
    oldest_first = runs[::-1]  # so the colour of a run stays when others are added
    lines = []
    for number, run in enumerate(oldest_first):
        name = names[run.path].rpartition("/")[2]
        lines.append(Line(clean(f"{name[:STAMP]} {fields[run]}".strip()), number))
    part = Part(f"Losses of {title}", anchor, level=3)
    part.draw(loss_drawings(oldest_first, lines))
    part.keys = keys_of(lines)
    part.paragraphs = [SECONDS]
    return [part] if part.pictures else []


def keys_of(lines: Sequence[Line]) -> list[dict[str, str]]:
    """Return the legend of some curves."""
    return [{"color": li.css, "dashes": li.dashes or "none", "text": li.label} for li in lines]


def parts_of_run(run: SeenRun, name: str, anchor: str, clean: Cleaner) -> list[Part]:
    """Return a run's results, its load of experts, its timelines, and what runs it again."""
    environment = read_json(run.path / "env.json")
    summary = {key: value for key, value in run.summary.items() if value is not None}
    head = Part(name, anchor, in_contents=False)
    head.facts = [("state", run.state), *begun(run)]
    head.facts += [
        (words, of_summary(key, summary[key])) for key, words in SUMMARY.items() if key in summary
    ]
    command = environment.get("command")
    if isinstance(command, str) and command:
        head.commands = [clean(command)]
    parts = [head]

    if loads := read_loads(run.path / "analysis" / "expert_load.csv"):
        part = Part("Load of the experts by layer over time", f"{anchor}-load", level=3)
        part.paragraphs = [
            "Copies of each expert since the last log, over the fair share of its layer."
        ]
        part.keys = LOAD_KEYS
        part.draw(load_drawings(loads))
        parts.append(part)
    if timelines := plan_drawings(run.path) + trace_drawings(run.path, clean):
        part = Part("Timelines", f"{anchor}-timelines", level=3, keys=OPERATOR_KEYS)
        part.draw(timelines)
        parts.append(part)
    parts.append(environment_of(run, environment, f"{anchor}-environment", clean))
    return parts


def of_summary(key: str, value: Any) -> str:
    """Return a value of summary.json for a reader; shares as per cent."""
    is_share = key in SHARES and isinstance(value, int | float)
    return f"{value:.2%}" if is_share else number(value)


def begun(run: SeenRun) -> list[tuple[str, str]]:
    return [("begun", datetime.fromtimestamp(run.begun).strftime("%Y-%m-%d %H:%M"))]


def environment_of(
    run: SeenRun, environment: Mapping[str, Any], anchor: str, clean: Cleaner
) -> Part:
    """Return machine, versions, code and configuration. No name of a machine is among them."""
    part = Part("Environment and configuration", anchor, level=3)
    facts = {key: environment.get(key) for key in ("platform", "cpus", "python")}
    packages = environment.get("packages")
    facts |= packages if isinstance(packages, dict) else {}
    facts["git commit"] = str(environment.get("git_commit") or "")[:COMMIT]
    if facts["git commit"]:
        facts["uncommitted changes"] = "yes" if environment.get("git_diff") else "no"
    part.facts = [(key, clean(str(value))) for key, value in facts.items() if value]
    part.text_title = run.config_path.name
    part.text = clean(run.config_path.read_text(encoding="utf-8", errors="replace"))
    return part


def parts_of_traces(sources: Sources) -> list[Part]:
    """Return a part with the timeline of each trace; none without one. Raises ConfigError for a
    trace that was named and has no MoE layer."""
    part = Part("Timelines", "timelines", keys=OPERATOR_KEYS)
    drawings = []
    for source in sources.of_kind("trace"):
        drawing = trace_drawing(source)
        if drawing is not None:
            drawings.append(drawing)
        elif source.named:
            raise ConfigError(
                f"{source.path} has no MoE layer: it lacks scmoe/route or scmoe/decode. Leave it"
                " out."
            )
    part.draw(drawings)
    return [part] if drawings else []


def number(value: Any) -> str:
    """Return a number for a reader: large ones with commas, others with four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, float) and (value.is_integer() or abs(value) >= 1000):
        value = round(value)
    return f"{value:,}" if isinstance(value, int) else in_one_line(value)


def value_of(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return form.format(value) if isinstance(value, int | float) else ""


def without_empty_columns(
    headings: Sequence[str], cells: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells without the columns that have no value in any row."""
    kept = [i for i in range(len(headings)) if any(row[i] for row in cells)]
    return [headings[i] for i in kept], [[row[i] for i in kept] for row in cells]
