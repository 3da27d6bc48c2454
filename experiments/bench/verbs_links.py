"""`scmoe bench inference`, `exchange` and `timeline` measure on shaped links."""

import json
from pathlib import Path
from typing import Literal

from scmoe.config.leaves import ConfigError
from scmoe.experiments.bench.verbs_pairs import OUT, Compute, Count, Positive, Rounds, Share

TIMELINE = Path("runs/timeline")


def inference(
    *, share: Share = 0.52, ranks: int = 2, prompt: int = 512, batch: int = 8, rounds: Rounds = 9, out: Path = OUT
) -> None:
    """Prefill and decode between ranks, sequential, overlapped and as planned."""
    given = locals()
    from scmoe.experiments.bench.decoding import bench_generation
    from scmoe.experiments.bench.inference import bench_inference
    from scmoe.experiments.engine import links

    links.require()
    report = bench_inference(**given)
    cached = bench_generation(batch=4, prompt=32, tokens=256, rounds=3, threads=1)["cached_over_uncached"]
    print(json.dumps(report | {"cached_over_uncached": cached}))


def exchange(
    *,
    nodes: int = 2,
    ranks: int = 4,
    between_mbit: Positive = 500.0,
    kilobytes: list[Count] | None = None,
    rounds: Rounds = 15,
) -> None:
    """Flat and hierarchical All-to-All on nodes, by size of the messages.

    Args:
        between_mbit: rate of a node's network card
        kilobytes: of a rank for each other rank (default: 1 4 16 64 256 1024)
    """
    from scmoe.experiments.bench.exchange import bench_exchange, why_no_nodes
    from scmoe.experiments.engine.links import require

    if refused := why_no_nodes(nodes, ranks):
        raise ConfigError(refused)
    require(nodes)
    print(json.dumps(bench_exchange(nodes, ranks, between_mbit, kilobytes or [1, 4, 16, 64, 256, 1024], rounds)))


def timeline(
    *,
    share: Share = 0.52,
    ranks: int = 2,
    compute: Compute = "emulated",
    position: Literal["pos1", "pos2", "pos3"] = "pos2",
    run: Path | None = None,
    out: Path = TIMELINE,
) -> None:
    """One pair's operators, measured and planned (Fig. 7), and Chrome traces.

    Args:
        run: draw the plan of this run with schedule=auto instead; nothing is measured
    """
    from scmoe.experiments.bench import timeline
    from scmoe.experiments.engine import links

    if run is not None:
        if (share, ranks, compute, position, out) != (0.52, 2, "emulated", "pos2", TIMELINE):
            raise ConfigError("--run is given, allowed: alone, as a run's plan is drawn and nothing is measured")
        return print(json.dumps(timeline.draw_plan(run)))
    timeline.check(ranks)
    links.require()
    print(json.dumps(timeline.bench_timeline(share, compute, position, ranks, out)))
