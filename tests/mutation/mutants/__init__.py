"""The list of known bugs that `python -m tests.mutation.mutate` puts back, joined from one file per theme."""

from __future__ import annotations

from tests.mutation.mutants import (
    checkpoints,
    extending,
    generation,
    models,
    offload,
    package,
    ranks,
    routing,
    running,
    seeing,
    sharded,
)

MODULES = checkpoints, ranks, routing, running, models, generation, offload, package, seeing, extending, sharded
MUTANTS = [mutant for module in MODULES for mutant in module.MUTANTS]
