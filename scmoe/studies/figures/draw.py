"""The figures of the paper by their numbers: from reports of the bench (1, 8), from a run (9, 10), or from assumed
operator times (4, 7)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scmoe.analysis.gating import draw_gating
from scmoe.analysis.similarity import draw_similarity
from scmoe.config.leaves import ConfigError
from scmoe.studies.figures.explained import pair, timelines
from scmoe.studies.figures.scenarios import draw_shares, draw_speeds, read_reports
from scmoe.studies.runs import open_run

PAGES = Path("docs/figures")
EXPLAINED = {4: pair, 7: timelines}
OF_REPORTS = {1: draw_shares, 8: draw_speeds}
OF_A_RUN = {9: ("gating", draw_gating), 10: ("similarity", draw_similarity)}
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
        raise ConfigError(
            f"Fig. {number} is drawn from {sources[0]!r}, allowed: nothing; make timeline measures Fig. 7"
        )
    draw = EXPLAINED[number]
    return Drawing(PAGES, draw.__name__, draw, (".png",))


def of_a_run(number: int, sources: Sequence[str]) -> Drawing:
    """Return a picture of what the callback `Analysis` has measured in a run."""
    if len(sources) != 1:
        raise ConfigError(f"Fig. {number} is drawn from {' '.join(sources) or 'nothing'}, allowed: one run")
    name, draw = OF_A_RUN[number]
    run = open_run(sources[0])
    path, key = run.path / "analysis" / f"{name}.npz", f"analysis.{name}_every"
    if not path.exists():
        value = "null" if run.config[key] == "None" else run.config[key]
        required = f"Fig. {number} requires a run that was trained with {key}=N, N in optimizer steps"
        raise ConfigError(f"{key} is {value} in {run.path}, and there is no analysis/{name}.npz; {required}")
    with np.load(path, allow_pickle=False) as stored:
        steps, labels, values = stored["steps"].tolist(), stored["labels"].tolist(), stored["values"]
    config = run.config
    architecture = config["moe.architecture"]
    position = f", {config['moe.position']}" if architecture in TAPPED else ""
    model = f"{config['model.family']}, {config['model.layers']} layers, width {config['model.dim']}, {architecture}"
    words = f"Fig. {number}: {model}{position}, {config['data.name']}"
    return Drawing(path.parent, f"figure-{number}", partial(draw, steps, labels, values, words=words))
