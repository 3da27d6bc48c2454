"""`scmoe bench` measures on this machine what one rank does, and pairs of blocks and exchanges
between ranks.

A command imports what it measures with inside itself, so that its help and a wrong request are
answered at once.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators

from experiments.bench.pairs import (
    USUAL_RATIO,
    Count,
    Positive,
    Rounds,
    Setting,
    check_ranks,
    tokens_for,
    usual_rows,
)
from experiments.engine import links
from scmoe.command_line import OneEach, call
from scmoe.config.extras import require
from scmoe.config.leaves import ConfigError

OUT, TIMELINE = Path("runs/bench"), Path("runs/timeline")
USUAL = Setting()
Compute = Literal["real", "emulated"]
Grows = Literal["tokens", "ranks", "experts"]
TrainRow = Literal[
    "top2",
    "shared_expert",
    "scmoe_pos2",
    "scmoe_pos3",
    "top2_two",
    "shared_expert_two",
    "scmoe_pos2_two",
    "scmoe_pos3_two",
]
Share = Annotated[float, Parameter(validator=validators.Number(gt=0, lt=1))]
main = App(name="bench", help="Measure on this machine. Standard output is JSON.")


@main.command
def generation(
    *,
    batch: list[Count] | None = None,
    prompt: Count = 32,
    tokens: Count = 256,
    rounds: Count = 3,
    threads: Count = 1,
) -> None:
    """Generation with a cache and without, and beside transformers' GPT-2.

    Args:
        batch: numbers of texts; the result is that of the last, and of each under `by_batch`
            (default: 1 4)
    """
    given = locals() | {"batch": (batch or [1, 4])[-1]}
    if tokens < 2:
        raise ConfigError(
            f"--tokens is {tokens}, allowed: 2 or more, as the first one is no decoding step"
        )
    require("bench generation", "transformers")
    from experiments.bench.decoding import bench_generation

    print(json.dumps(bench_generation(batch or [1, 4], prompt, tokens, threads, rounds) | given))


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
    if top_k > experts:
        raise ConfigError(f"--top-k is {top_k}, allowed: at most --experts ({experts})")
    from experiments.bench.layer import bench_layer

    print(json.dumps(bench_layer(**given) | given))


@main.command
def guard(*overrides: str) -> None:
    """Cost of the guard against NaN and Inf, as a share of a step.

    Args:
        overrides: key=value, of a small model's config
    """
    from experiments.bench.step_cost import guard_cost

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
        share: communication share of a sequential top-2 pair, on shaped links (default: the
            loopback device)
    """
    given = locals()
    from experiments.bench.step_cost import SIZE, dense_cost
    from experiments.engine.ranks import run_ranks
    from scmoe.config.load import load as load_config

    if ranks % 2 or ranks % ep_size:
        raise ConfigError(
            f"--ranks is {ranks}, allowed: multiples of 2 nodes and of --ep-size ({ep_size})"
        )
    name, parts = (
        ("--ep-size", ep_size) if share is None else ("--ranks", ranks)
    )  # on all ranks for the links' rate
    if (experts := load_config(None, [*SIZE, *overrides]).moe.num_experts) % parts:
        raise ConfigError(f"{name} is {parts}, allowed: divisors of the {experts} experts")
    if share is not None:
        links.require()
    args = ep_size, batch, rounds, share, overrides
    report, *_ = run_ranks(dense_cost, ranks, *args, timeout_s=3600, own_links=share is not None)
    print(json.dumps(report | given))


@main.command
def overlap(
    *,
    share: float | None = None,
    ranks: Count | None = None,
    compute: Compute | None = None,
    reductions: Literal["ddp", "paced"] | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    dim: Count | None = None,
    ffn_dim: Count | None = None,
    heads: Count | None = None,
    tokens: Count | None = None,
    rows_per_gradient: Positive | None = None,
    accumulate: Count | None = None,
    layers: Count | None = None,
    rows: list[str] | None = None,
    load: OneEach[str] = (),
    setting: Setting = USUAL,
    out: Path = OUT,
) -> None:
    """How much of the All-to-All every architecture and schedule hides.

    Args:
        share: communication share of sequential top-2, forward (default: 0.52)
        ranks: (default: 2; on cuda 1)
        compute: (default: emulated; on cuda real)
        reductions: of gradients, at level iteration (default: paced, on a GPU ddp)
        device: cuda: one GPU, rows over its bus
        dim: (default: 512; at level iteration 256)
        ffn_dim: (default: 4 times --dim)
        heads: (default: 8; at level iteration 4)
        tokens: of one rank in one batch (default: 1024; at level iteration as --rows-per-gradient)
        rows_per_gradient: bytes of rows over bytes of gradients that a rank sends in a step of
            top-2, met by the tokens of a batch (default: 3)
        accumulate: batches of a step, whose gradients are summed once (default: 1)
        layers: blocks of a row (default: 2; at level iteration 4)
        rows: rows to measure (default: all with one batch in flight). NAME_two: with two batches in
            flight; NAME_two_pipelined: in two chunks too
        load: uneven routing, measured beside the balanced one; each --load is one more. Forms
            (bench/loads.py): zipf:A, spread:A, hot_expert:X, hot_rank:X, empty_rank, rotating:X:N,
            burst:X:N, ragged:X, recorded:FILE; A is an exponent, X a multiple of the mean, N a
            number of steps
    """
    if share is not None and setting.link_mbit is not None:
        raise ConfigError(
            "--share and --link-mbit exclude each other: the rate is searched for the share, or"
            " given"
        )
    iteration = setting.level == "iteration"
    gradients = {
        "--reductions": reductions,
        "--rows-per-gradient": rows_per_gradient,
        "--accumulate": accumulate,
    }
    if not iteration and (given := [name for name, value in gradients.items() if value]):
        raise ConfigError(
            f"{given[0]} belongs to --level iteration, and --level is {setting.level}"
        )
    if rows_per_gradient is not None and tokens is not None:
        raise ConfigError(
            "--rows-per-gradient and --tokens exclude each other: the tokens are found, or given"
        )
    gpu = device == "cuda"
    compute = compute or ("real" if gpu else "emulated")
    if compute == "emulated" and (
        heads or (ffn_dim and not iteration)
    ):  # an iteration has its gradients
        raise ConfigError(
            f"--{'heads' if heads else 'ffn-dim'} belongs to real compute, and --compute is"
            " emulated"
        )
    usual_dim, usual_heads = (256, 4) if iteration else (Setting.dim, Setting.heads)
    dim = dim or usual_dim
    setting = replace(
        setting,
        dim=dim,
        ffn_dim=ffn_dim or 4 * dim,
        heads=heads or usual_heads,
        tokens=tokens or Setting.tokens,
        accumulate=accumulate or 1,
        asked_layers=layers,
        share=Setting.share if share is None else share,
        compute=compute,
        reductions=reductions or ("ddp" if gpu else "paced"),
        rows=tuple(dict.fromkeys(rows or usual_rows(setting.every))),
        loads=tuple(dict.fromkeys(load)),
        device=device,
    )
    ranks = ranks or (1 if gpu else 2)
    if iteration and tokens is None:
        ratio = rows_per_gradient or USUAL_RATIO
        setting = replace(
            setting, tokens=tokens_for(ratio, setting, max(2, ranks)), rows_per_gradient=ratio
        )
    from experiments.bench.overlap_report import bench_overlap

    print(json.dumps(bench_overlap(setting, ranks, out)))


@main.command
def train(
    *overrides: str,
    config: str = "experiment/slow_network",
    share: Share = 0.52,
    ranks: int = 2,
    rounds: Rounds = 10,
    rows: list[TrainRow] | None = None,
    load: str | None = None,
    out: Path = OUT,
) -> None:
    """What a slow network costs `scmoe train` of each architecture, and what a shortcut hides of
    it.

    Args:
        overrides: key=value, of the config
        share: communication share of a sequential top-2 pair of the config's sizes, forward
        rounds: turns of each training in the second half of its steps
        rows: the first is what the others are compared with (default: all with one batch in flight)
        load: uneven routing (its forms: bench overlap --help) in place of the routers' choices,
            beside balanced routing
    """
    if ranks < 2:
        raise ConfigError(f"--ranks is {ranks}, allowed: 2 or more, as one rank sends nothing")
    links.require()
    from experiments.bench.training import ARCHITECTURES, bench_train

    print(
        json.dumps(
            bench_train(
                config, overrides, share, ranks, rounds, rows or list(ARCHITECTURES), load, out
            )
        )
    )


@main.command
def growth(
    *,
    of: list[Grows] | None = None,
    points: list[int] | None = None,
    rounds: Rounds = 5,
    out: Path = OUT,
) -> None:
    """How the time of a pair of blocks, and what overlap saves of it, grow.

    Args:
        of: (default: all three)
        points: its values, with one --of
    """
    names = of or ["tokens", "ranks", "experts"]
    if points and len(names) > 1:
        raise ConfigError("--points goes with one --of")
    from experiments.bench import growth

    growth.check(names[0], points or [])
    links.require()
    print(json.dumps(growth.bench_growth(names, points, rounds, out)))


@main.command
def inference(
    *,
    share: Share = 0.52,
    ranks: int = 2,
    prompt: int = 512,
    batch: int = 8,
    texts: Count = 1,
    rounds: Rounds = 9,
    load: OneEach[str] = (),
    out: Path = OUT,
) -> None:
    """Prefill and decode between ranks, sequential, overlapped and as planned.

    Passes of several texts are measured with two batches in flight too.

    Args:
        batch: texts of a rank in decode
        texts: texts of a rank in prefill
        load: uneven routing (its forms: bench overlap --help), measured beside the balanced one;
            each --load is one more
    """
    from experiments.bench.inference import bench_inference

    print(json.dumps(bench_inference(share, prompt, batch, rounds, ranks, load, out, texts)))


@main.command
def routing(*trainings: str, work: Path = Path("runs/routing"), out: Path = OUT) -> None:
    """How uneven the routing of real trainings is in each step, at their start and end.

    Args:
        trainings: names (default: the quickstart with each balance rule, and small twins of Table
            3)
        work: folder of their runs; one that is there is not trained again
    """
    from experiments.bench.routing_study import bench_routing

    print(json.dumps(bench_routing(trainings, work, out)["rows"]))


@main.command
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
    from experiments.bench.exchange import bench_exchange, why_no_nodes

    if refused := why_no_nodes(nodes, ranks):
        raise ConfigError(refused)
    links.require(nodes)
    print(
        json.dumps(
            bench_exchange(
                nodes, ranks, between_mbit, kilobytes or [1, 4, 16, 64, 256, 1024], rounds
            )
        )
    )


@main.command
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
    from experiments.bench import timeline

    if run is not None:
        if (share, ranks, compute, position, out) != (0.52, 2, "emulated", "pos2", TIMELINE):
            raise ConfigError(
                "--run draws the plan of a run and measures nothing. Leave the other options out"
            )
        return print(json.dumps(timeline.draw_plan(run)))
    check_ranks(ranks)
    links.require()
    print(json.dumps(timeline.bench_timeline(share, compute, position, ranks, out)))


if __name__ == "__main__":
    sys.exit(call("bench", *sys.argv[1:]))
