"""The sections of runs: an overview, the losses of each experiment, and each run.

Pictures of a run are those that it has drawn; losses are drawn as `scmoe compare` draws them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scmoe.files import read_json
from scmoe.runs.compare import PANELS, curve_over_seconds, draw, run_letters
from scmoe.runs.html_report.cleaner import COMMIT, Cleaner
from scmoe.runs.html_report.section import Section, embedded, flat_table, number
from scmoe.runs.seen import SeenRun, differing_fields

STAMP = 15  # letters of the date and time that a run's name begins with
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
IN_PERCENT = ("drop_share", "mfu", "val_accuracy")  # keys of summary.json
SECONDS = (
    "Seconds are those of training steps, without validation and checkpoints: tokens over the"
    " logged speeds, added up."
)


def sections_of_runs(runs: Sequence[SeenRun], clean: Cleaner) -> list[Section]:
    """Return an overview of all runs, the losses of each experiment, and the sections of each
    run; nothing without a run."""
    if not runs:
        return []
    names = names_of(runs, clean)
    sections = [overview(runs, names, clean)]
    by_folder = sorted(runs, key=lambda run: str(run.path.parent))
    for i, (folder, members) in enumerate(groupby(by_folder, lambda run: run.path.parent), 1):
        sections += losses(clean(folder.name), f"losses-{i}", [*members], clean)
    for i, run in enumerate(runs, 1):
        sections += sections_of_run(run, names[run.path], f"run-{i}", clean)
    return sections


def names_of(runs: Sequence[SeenRun], clean: Cleaner) -> dict[Path, str]:
    """Return the last two folders of each run's path; the whole path where several runs have the
    same two."""
    short = {run.path: "/".join(run.path.parts[-2:]) for run in runs}
    times = Counter(short.values())
    return {path: clean(str(path) if times[name] > 1 else name) for path, name in short.items()}


def overview(runs: Sequence[SeenRun], names: Mapping[Any, str], clean: Cleaner) -> Section:
    fields = differing_fields(runs)
    rows = {names[run.path]: {"differs in": clean(fields[run]), **run.facts()} for run in runs}
    links = [f"run-{i}" for i in range(1, len(runs) + 1)]
    return Section("Runs", "runs", tables=[flat_table(rows, "run")], links=links)


def losses(title: str, anchor: str, runs: Sequence[SeenRun], clean: Cleaner) -> list[Section]:
    """Return the losses of the runs of one folder; none where nothing was logged."""
    runs = [run for run in runs[::-1] if any(run.curve(metric) for metric in PANELS)]
    if not runs:  # reversed, so that a run keeps its colour when others are added
        return []
    fields = differing_fields(runs)
    labels = [
        clean(f"{letter}: {run.path.name[:STAMP]} {fields[run]}".strip())
        for letter, run in zip(run_letters(runs), runs, strict=True)
    ]
    section = Section(f"Losses of {title}", anchor, level=3)
    has_speeds = any(curve_over_seconds(run, metric) for run in runs for metric in PANELS)
    with TemporaryDirectory() as folder:
        pictures = {Path(folder, "tokens.png"): f"Losses of {title} over {runs[0].counts}"}
        draw(runs, labels, Path(folder, "tokens.png"))
        if has_speeds:
            section.paragraphs = [SECONDS]
            pictures[Path(folder, "seconds.png")] = f"Losses of {title} over seconds of training"
            draw(runs, labels, Path(folder, "seconds.png"), over_seconds=True)
        section.pictures = embedded(pictures)
    return [section]


def sections_of_run(run: SeenRun, name: str, anchor: str, clean: Cleaner) -> list[Section]:
    """Return a run's results with its pictures, and what runs it again."""
    environment = read_json(run.path / "env.json")
    summary = {key: value for key, value in run.summary.items() if value is not None}
    begun = datetime.fromtimestamp(run.begun).strftime("%Y-%m-%d %H:%M")
    head = Section(name, anchor, in_contents=False, facts=[("state", run.state), ("begun", begun)])
    head.facts += [
        (words, shown_value(key, summary[key])) for key, words in SUMMARY.items() if key in summary
    ]
    command = environment.get("command")
    if isinstance(command, str) and command:
        head.commands = [clean(command)]
    drawn = sorted((run.path / "analysis").glob("*.png"))
    head.pictures = embedded({path: path.stem.replace("_", " ") for path in drawn})
    return [head, environment_of(run, environment, f"{anchor}-environment", clean)]


def shown_value(key: str, value: Any) -> str:
    """Return a value of summary.json for a reader; shares as per cent."""
    is_share = key in IN_PERCENT and isinstance(value, int | float)
    return f"{value:.2%}" if is_share else number(value)


def environment_of(
    run: SeenRun, environment: Mapping[str, Any], anchor: str, clean: Cleaner
) -> Section:
    """Return machine, versions, code and configuration. No name of a machine is among them."""
    section = Section("Environment and configuration", anchor, level=3)
    facts = {key: environment.get(key) for key in ("platform", "cpus", "python")}
    packages = environment.get("packages")
    facts |= packages if isinstance(packages, dict) else {}
    facts["git commit"] = str(environment.get("git_commit") or "")[:COMMIT]
    if facts["git commit"]:
        facts["uncommitted changes"] = "yes" if environment.get("git_diff") else "no"
    section.facts = [(key, clean(str(value))) for key, value in facts.items() if value]
    section.text_title = run.config_path.name
    section.text = clean(run.config_path.read_text(encoding="utf-8", errors="replace"))
    return section
