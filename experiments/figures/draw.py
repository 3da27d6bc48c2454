"""The figures of the paper by their numbers: from reports of the bench (1, 8), from a run (9, 10), or from assumed
operator times (4, 7). pages.py draws those of the docs."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scmoe.config.leaves import ConfigError
from scmoe.config.program import scmoe
from scmoe.experiments.figures.explained import pair, timelines
from scmoe.experiments.figures.scenarios import draw_shares, draw_speeds, read_reports
from scmoe.probes.gating import draw_gating
from scmoe.probes.similarity import draw_similarity
from scmoe.runs.seen import open_run

PAGES = Path("docs/figures")
EXPLAINED = {4: pair, 7: timelines}
OF_REPORTS = {1: draw_shares, 8: draw_speeds}
OF_A_RUN = {9: ("gating", draw_gating), 10: ("similarity", draw_similarity)}
NAMES = {
    "scmoe": "ScMoE",
    "dgmoe": "DGMoE",
    "dgmoe_share": "DGMoE-Share",
    "top_k": "Standard top-{moe.top_k}",
    "shared_expert": "Shared-expert",
    "dense": "dense",
}
TAPPED = ("scmoe", "dgmoe", "dgmoe_share")  # the architectures that have a position


class Drawing(NamedTuple):
    """A figure that is still to be drawn: the folder of its sources, its name there, and what draws it into a file."""

    folder: Path
    name: str
    draw: Callable[[Path], None]
    suffixes: tuple[str, ...] = (".png", ".pdf")


def draw_figure(number: int, sources: Sequence[str], out: Path | None) -> list[Path]:
    """Draw a figure of the paper and return its files: PNG, and PDF for print. Raises ConfigError.

    sources: the directory of a run, or files and folders of reports of `bench overlap`. out: None: beside the sources.
    """
    if number in EXPLAINED:
        drawing = explained(number, sources)
    elif number in OF_A_RUN:
        drawing = of_a_run(number, sources)
    else:
        reports = read_reports([Path(source) for source in sources])
        folder = Path(sources[0])
        folder = folder if folder.is_dir() else folder.parent
        drawing = Drawing(folder, f"figure-{number}", partial(OF_REPORTS[number], reports))
    files = [(out or drawing.folder) / (drawing.name + suffix) for suffix in drawing.suffixes]
    for path in files:
        drawing.draw(path)
    return files


def explained(number: int, sources: Sequence[str]) -> Drawing:
    """Return a picture of the docs. It has no measurement."""
    if sources:
        measured = f"{scmoe('bench', 'timeline')} measures Fig. 7"
        raise ConfigError(f"Fig. {number} is drawn from {sources[0]!r}, allowed: nothing; {measured}")
    draw = EXPLAINED[number]
    return Drawing(PAGES, draw.__name__, draw, (".png",))


def of_a_run(number: int, sources: Sequence[str]) -> Drawing:
    """Return a picture of what the callback `Analysis` has measured in a run."""
    if len(sources) != 1:
        raise ConfigError(f"Fig. {number} is drawn from {' '.join(sources) or 'nothing'}, allowed: one run")
    name, _ = OF_A_RUN[number]
    run = open_run(sources[0])
    path, key = run.path / "analysis" / f"{name}.npz", f"analysis.{name}_every"
    if not path.exists():
        value = "null" if run.config[key] == "None" else run.config[key]
        required = f"Fig. {number} requires a run that was trained with {key}=N, N in optimizer steps"
        raise ConfigError(f"{key} is {value} in {run.path}, and there is no analysis/{name}.npz; {required}")
    with np.load(path, allow_pickle=False) as stored:
        found = {"number": number, "words": words_of(number, run.config)}
        found |= {name: stored[name].tolist() for name in ("steps", "labels", "values")}
    return Drawing(path.parent, f"figure-{number}", partial(draw_measured, found), (".png", ".pdf", ".json"))


def words_of(number: int, config: Mapping[str, str]) -> str:
    """Return the title of a figure of a run: its model as the paper would name it, and its data."""
    architecture, family = config["moe.architecture"], config["model.family"].upper()
    position = f" ({config['moe.position'].replace('pos', 'Pos-')})" if architecture in TAPPED else ""
    name = NAMES.get(architecture, architecture).replace("{moe.top_k}", config["moe.top_k"]) + position
    size = f"{config['model.layers']} layers, width {config['model.dim']}"
    return f"Fig. {number}: {family}, {size}, {name}, {config['data.name']}"


def draw_measured(found: dict[str, Any], path: Path) -> None:
    """Draw Fig. 9 or 10 into a file; into a .json, write what it is drawn from."""
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n")
        return
    _, draw = OF_A_RUN[found["number"]]
    draw(found["steps"], found["labels"], np.array(found["values"]), path, words=found["words"])
