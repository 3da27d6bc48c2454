"""The list of known bugs that `python -m tests.mutation.mutate` puts back, joined from one file per theme."""

from __future__ import annotations

from tests.mutation.mutants import checkpoints, models, package, ranks, routing, running

MUTANTS = checkpoints.MUTANTS + ranks.MUTANTS + routing.MUTANTS + running.MUTANTS + models.MUTANTS + package.MUTANTS
