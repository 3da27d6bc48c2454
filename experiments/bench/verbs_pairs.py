"""`scmoe bench overlap` and `growth` measure pairs of blocks between ranks."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from scmoe.config.leaves import ConfigError

OUT = Path("runs/bench")
Compute = Literal["real", "emulated"]
Grows = Literal["tokens", "ranks", "experts"]
Rounds = Annotated[int, Parameter(validator=validators.Number(gte=2))]  # of which quartiles are taken
Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Positive = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Share = Annotated[float, Parameter(validator=validators.Number(gt=0, lt=1))]


def overlap(
    *,
    share: float | None = None,
    link_mbit: Positive | None = None,
    ranks: Count | None = None,
    nodes: Count = 1,
    exchange: Literal["flat", "hierarchical", "auto"] = "flat",
    compute: Compute | None = None,
    level: Literal["block", "iteration"] = "block",
    reductions: Literal["ddp", "paced"] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: Rounds = 9,
    rows: list[str] | None = None,
    dim: Count | None = None,
    ffn_dim: Count | None = None,
    tokens: Count | None = None,
    heads: Count | None = None,
    seq_len: Count | None = None,
    num_experts: Count | None = None,
    attention_ms: Positive | None = None,
    attention_to_mlp: Positive | None = None,
    out: Path = OUT,
) -> None:
    """How much of the All-to-All every architecture and schedule hides.

    Args:
        share: communication share of sequential top-2, forward (default: 0.52)
        link_mbit: rate of the links; by default it is searched for the share
        ranks: (default: 2; on cuda 1)
        nodes: on which the ranks are; the rate is that of the nodes' network cards
        exchange: between nodes
        compute: (default: emulated; on cuda real)
        reductions: of gradients, at level iteration (default: paced, on a GPU ddp)
        device: cuda: one GPU, rows over its bus
        rows: rows to measure (default: all)
        dim: (default: 512)
        ffn_dim: (default: 2048)
        tokens: (default: 1024)
        heads: (default: 8)
        seq_len: (default: 256)
        num_experts: (default: 8)
        attention_ms: (default: 45)
        attention_to_mlp: (default: 3)
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from scmoe.experiments.bench.overlap_report import bench_overlap

    print(json.dumps(bench_overlap(given)))


def growth(
    *, of: list[Grows] | None = None, points: list[int] | None = None, rounds: Rounds = 5, out: Path = OUT
) -> None:
    """How the time of a pair of blocks, and what overlap saves of it, grow.

    Args:
        of: (default: all three)
        points: its values, with one --of
    """
    names = of or ["tokens", "ranks", "experts"]
    if points and len(names) > 1:
        raise ConfigError("--points goes with one --of")
    from scmoe.experiments.bench import growth
    from scmoe.experiments.engine import links

    growth.check(names[0], points or [])
    links.require()
    print(json.dumps(growth.bench_growth(names, points, rounds, out)))
