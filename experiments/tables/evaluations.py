"""Evaluations of a table's runs, each right after its training.

The results for a run's last checkpoint go into its state. So a state that is kept or committed is
complete without the run's weights.
"""

import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.tables.table_file import PaperTable, Scale
from experiments.tables.table_runs import Run, look_up
from scmoe.config import registry
from scmoe.config.leaves import ConfigError
from scmoe.files import read_json
from scmoe.sweeps.jobs import State, StudyJob

EVALUATE = (sys.executable, "-m", "scmoe", "evaluate")


class Evaluations:
    """The evaluations of a table's runs: makes their jobs and reads their results. `jobs` has those
    that were made."""

    def __init__(self, table: PaperTable, scale: Scale) -> None:
        metrics = [] if scale.evaluate is None else table.metrics_from("evaluation")
        self.needed = [key for metric in metrics for key in metric.keys]
        self.words = list(scale.evaluate or ())
        self.jobs: list[StudyJob] = []

    def lacking(self, state: State) -> bool:
        """Return whether a finished run lacks a metric of an evaluation, or was evaluated by
        another command."""
        kept = state.results
        by_another = bool(self.needed) and kept.get("evaluated_by") != self.words
        return by_another or bool(missing(self.needed, kept.get("evaluation")))

    def check_data(self, runs: Sequence[Run]) -> None:
        """Raise ConfigError if a run is to be evaluated on data that is not here: it would be known
        after the first training only."""
        places = [word for option, word in pairwise(self.words) if option in ("--data", "--text")]
        gone = [place for place in places if not Path(place).exists()]
        if gone and any(self.lacking(run.state) for run in runs):
            raise ConfigError(
                f"evaluate is {' '.join(self.words)}, but there is no {' and no '.join(gone)}. Put"
                " the data there (docs/sweep.md#run-a-table-of-the-paper), or take another SCALE"
            )

    def can_use(self, state: State) -> bool:
        """Return whether a finished run lacks nothing, or has its weights on this machine, so that
        it can be evaluated."""
        weights = Path(state.run_dir).glob("checkpoints/*.ckpt") if state.run_dir else ()
        return not self.lacking(state) or any(weights)

    def job(self, run: Run) -> StudyJob | None:
        """Return the job that evaluates a finished run; None: nothing is lacking.

        The results of another command are dropped, so that a table never compares two kinds of
        evaluation.
        """
        if not self.lacking(run.state):
            return None
        for key in ("evaluation", "evaluated_by"):
            run.state.results.pop(key, None)
        run.job.keep()
        name, study = f"{run.job.name}-evaluation", run.job.study
        title = f"evaluation of {run.row.name}, seed {run.seed}"
        words = [str(run.state.run_dir), *registry.words(run.config.extensions, {}), *self.words]
        self.jobs.append(
            StudyJob(name, title, study, None, words, EVALUATE, judge=partial(self.judge, run=run))
        )
        return self.jobs[-1]

    def judge(self, job: StudyJob, run: Run) -> None:
        """Put the results of a finished evaluation into the state of its run. The evaluation has
        failed if a metric is missing."""
        path = Path(job.arguments[0]) / "evaluation.json"  # an entry for each checkpoint
        newest: dict[str, Any] = max(
            read_json(path).values(), key=lambda entry: entry["step"], default={}
        )
        if lacks := missing(self.needed, newest):
            job.fail(f"it ended without a finite {', '.join(lacks)} in evaluation.json")
        else:
            run.state.results["evaluation"] = newest
            run.state.results["evaluated_by"] = self.words
            run.job.keep()


def missing(keys: Sequence[str], results: Any) -> list[str]:
    """Return the dotted keys that do not lead to a number."""
    return [key for key in keys if look_up(results, key) is None]
