"""`scmoe` whose sweeps have toy trainings: `python -m tests.support.toy_sweep SECONDS@RATE sweep
FILE ...`; toy_training.py says what SECONDS@RATE does."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from scmoe.command_line import call
from scmoe.sweeps import trials
from scmoe.sweeps.jobs import StudyJob


def toy_job(pause: str) -> type[StudyJob]:
    @dataclass(eq=False)
    class ToyJob(StudyJob):
        launcher: Sequence[str] = (
            *(sys.executable, "-m", "tests.support.toy_training", pause, "train"),
        )

    return ToyJob


if __name__ == "__main__":
    trials.StudyJob = toy_job(sys.argv[1])
    sys.exit(call(*sys.argv[2:]))
