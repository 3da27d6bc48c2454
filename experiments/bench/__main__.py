"""`scmoe bench` measures on this machine. What needs several ranks is in bench_pairs.py and bench_links.py."""

import json
import sys

from cyclopts import App

from scmoe.config.leaves import ConfigError
from scmoe.experiments.bench.verbs_links import exchange, inference, timeline
from scmoe.experiments.bench.verbs_pairs import Count, Share, growth, overlap
from scmoe.experiments.engine.command_line import call

main = App(name="bench", help="Measure on this machine. The last line on standard output is JSON.")


@main.command
def generation(
    *, batch: Count = 4, prompt: Count = 32, tokens: Count = 256, rounds: Count = 3, threads: Count = 1
) -> None:
    """Generation with a cache and without."""
    given = locals()
    if tokens < 2:
        raise ConfigError(f"--tokens is {tokens}, allowed: 2 or more, as the first one is no decoding step")
    from scmoe.experiments.bench.decoding import bench_generation

    print(json.dumps(bench_generation(**given) | given))


@main.command
def layer(
    *,
    dim: Count = 512,
    ffn_dim: Count = 2048,
    tokens: Count = 2048,
    experts: Count = 8,
    top_k: Count = 2,
    rounds: Count = 15,
    threads: Count = 1,
    capacity: float | None = None,
) -> None:
    """Time of the MoE layer over that of its dense products.

    Args:
        capacity: capacity factor (default: dropless)
    """
    given = locals()
    from scmoe.experiments.bench.layer import bench_layer

    print(json.dumps(bench_layer(**given) | given))


@main.command
def guard(*overrides: str) -> None:
    """Cost of the guard against NaN and Inf, as a share of a step.

    Args:
        overrides: key=value, of a small model's config
    """
    from scmoe.experiments.bench.step_cost import guard_cost

    print(json.dumps(guard_cost(overrides) | {"overrides": overrides}))


@main.command
def dense(
    *overrides: str,
    ranks: Count = 4,
    ep_size: Count = 2,
    batch: Count = 4,
    rounds: Count = 9,
    share: Share | None = None,
) -> None:
    """A step with dense weights in shards over a step with replicated ones.

    Args:
        overrides: key=value, of a small model's config
        batch: sequences of a rank
        share: communication share of a sequential top-2 pair, on shaped links (default: the loopback device)
    """
    given = locals()
    from scmoe.experiments.bench.step_cost import bench_dense
    from scmoe.experiments.engine import links

    if ranks % 2 or ranks % ep_size:
        raise ConfigError(f"--ranks is {ranks}, allowed: multiples of 2 nodes and of --ep-size ({ep_size})")
    if share is not None:
        links.require()

    print(json.dumps(bench_dense(**given) | given))


for command in (overlap, growth, inference, exchange, timeline):
    main.command(command)

if __name__ == "__main__":
    sys.exit(call("bench", *sys.argv[1:]))
