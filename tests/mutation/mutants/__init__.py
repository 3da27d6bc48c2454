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
    reaching,
    routing,
    running,
    seeing,
    sharded,
)

OF_RUNS = checkpoints, running, seeing, package, reaching
OF_MODELS = ranks, routing, models, generation, offload, extending, sharded
MUTANTS = [mutant for module in (*OF_RUNS, *OF_MODELS) for mutant in module.MUTANTS]
