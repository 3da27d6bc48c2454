"""Results that outlive a run's directory and its machine: states are taken from other folders, and copied into one.

A state file holds a digest of its run's config. A run of equal digest need not be made again, whether it belongs to
another table (Tables 1, 5 and 6 have rows in common) or was made on another machine and committed (docs/results/).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from scmoe.config.leaves import ConfigError
from scmoe.experiments.studies.job import State
from scmoe.experiments.studies.table.evaluations import Evaluations
from scmoe.experiments.studies.table.table_runs import Run


def adopt(runs: Sequence[Run], folders: Iterable[Path], evaluations: Evaluations) -> int:
    """Give runs that are not finished the state of an equal run in <folder>/*/states/. Returns how many it gave.

    A state that lacks an evaluation is of use only where the run's weights are.
    """
    wanted = [run for run in runs if run.state.status != "finished"]
    found: dict[str, tuple[Path, State]] = {}
    for path in [path for folder in folders for path in sorted(folder.glob("*/states/*.json"))] if wanted else ():
        state = State(**json.loads(path.read_text()))
        usable = state.status == "finished" and evaluations.can_use(state)
        if usable and (digest := state.results.get("digest")):
            found.setdefault(digest, (path, state))
    for run in wanted:
        if run.digest in found:
            path, run.job.state = found[run.digest]
            if (table := path.parent.parent.name) != run.job.study.name:  # else it is a copy of this one
                run.job.state.results["from"] = table
            run.job.keep()
    return sum(run.digest in found for run in wanted)


def save(runs: Sequence[Run], to: Path) -> Path:
    """Copy the results, as JSON and as a page, and the states of finished runs into <to>/<table>-<scale>/.

    Raises ConfigError if no run is finished."""
    study = runs[0].job.study
    finished = [run for run in runs if run.state.status == "finished"]
    if not finished:
        raise ConfigError(f"--to is {str(to)!r}, and no run of {study.name} is finished; there is nothing to copy")
    folder = to / study.name
    (folder / "states").mkdir(parents=True, exist_ok=True)
    results = json.loads((study / "results.json").read_text())
    for row in results["rows"]:
        row["run_dirs"] = []  # they stay on this machine
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "table.md").write_text((study / "table.md").read_text())
    for run in finished:
        state = json.loads(run.job.state_file.read_text()) | {"run_dir": None}
        (folder / "states" / run.job.state_file.name).write_text(json.dumps(state) + "\n")
    return folder
