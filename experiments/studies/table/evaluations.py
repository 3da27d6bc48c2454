"""The evaluations of a table's runs: a run is evaluated right after its training.

Its results for the run's last checkpoint go into the run's state. So a state that is kept, or committed, lacks nothing
for which the run's weights would be needed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from scmoe.config import extensions
from scmoe.experiments.studies.job import Job, State
from scmoe.experiments.studies.table.kept import look_up
from scmoe.experiments.studies.table.rows import Scale, Table
from scmoe.experiments.studies.table.table_runs import Run

EVALUATE = (sys.executable, "-m", "scmoe.experiments.evaluate")


class Evaluations:
    """Makes the evaluations' jobs and reads their results. `of` has the run of each job that was made."""

    def __init__(self, table: Table, scale: Scale) -> None:
        self.needed = [key for metric in table.metrics_from("evaluation") for key in metric.keys]
        self.words = list(scale.evaluate or ())
        self.wanted = scale.evaluate is not None and bool(self.needed)
        self.of: dict[Job, Run] = {}

    def lacking(self, state: State) -> bool:
        """Does a finished run lack a metric of an evaluation, or was it evaluated by another command?"""
        kept = state.results
        return self.wanted and (kept.get("evaluated_by") != self.words or bool(self._missing(kept.get("evaluation"))))

    def can_use(self, state: State) -> bool:
        """Does a finished run lack nothing, or can it be evaluated here, because its weights are on this machine?"""
        weights = Path(state.run_dir).glob("checkpoints/*.ckpt") if state.run_dir else ()
        return not self.lacking(state) or any(weights)

    def job(self, run: Run) -> Job | None:
        """Return the job that evaluates a finished run; None: nothing is lacking.

        What another command has found is dropped, so that a table never compares two kinds of evaluation.
        """
        if not self.lacking(run.state):
            return None
        for key in ("evaluation", "evaluated_by"):
            run.state.results.pop(key, None)
        run.job.keep()
        name, study = f"{run.job.name}-evaluation", run.job.study
        title = f"evaluation of {run.row.name}, seed {run.seed}"
        words = [str(run.state.run_dir), *extensions.words(run.config.extensions, {}), *self.words]
        job = Job(name, title, study, study / "no-run-of-an-evaluation", words, EVALUATE)
        self.of[job] = run
        return job

    def judge(self, job: Job) -> None:
        """Put what a finished evaluation has found into the state of its run. It has failed if a metric is missing."""
        run = self.of[job]
        path = Path(job.arguments[0]) / "evaluation.json"  # an entry for each checkpoint
        entries = json.loads(path.read_text()) if path.exists() else {}
        found: dict[str, Any] = max(entries.values(), key=lambda entry: entry["step"], default={})
        if missing := self._missing(found):
            job.state.status, job.state.error = (
                "failed",
                f"it ended without a finite {', '.join(missing)} in evaluation.json",
            )
        else:
            run.state.results |= {"evaluation": found, "evaluated_by": self.words}
            run.job.keep()

    def _missing(self, found: Any) -> list[str]:
        return [key for key in self.needed if look_up(found, key) is None]
