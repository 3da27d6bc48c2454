"""The list of known bugs that `python -m tests.mutation.mutate` puts back, joined from one file per theme."""

from __future__ import annotations

from tests.mutation.mutants import checkpoints, models, ranks, routing, running, seeing

MUTANTS = checkpoints.MUTANTS + ranks.MUTANTS + routing.MUTANTS + running.MUTANTS + models.MUTANTS + seeing.MUTANTS
