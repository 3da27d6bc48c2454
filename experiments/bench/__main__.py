"""`scmoe bench` measures on this machine what one rank does, and pairs of blocks between ranks.

Each command imports its measurement inside the function, so that help and refusals come at once.
"""

import json
import sys
from pathlib import Path
from typing import Literal

from cyclopts import App

from experiments.bench.options import Compute, Count, InferenceOptions, Options, Rounds, Share
from experiments.bench.pairs import check_ranks
from experiments.engine import links
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError

OUT, TIMELINE = Path("runs/bench"), Path("runs/timeline")
NOTHING_ASKED = Options()
USUAL_INFERENCE = InferenceOptions()
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
main = App(name="bench", help="Measure on this machine. Standard output is JSON.")


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
    """Measure the time of the MoE layer over that of its dense products.

    Args:
        capacity: capacity factor (default: dropless)
    """
    sizes = locals()
    if top_k > experts:
        raise ConfigError(f"--top-k is {top_k}, allowed: at most --experts ({experts})")
    from experiments.bench.layer import bench_layer

    print(json.dumps(bench_layer(**sizes) | sizes))


@main.command
def overlap(*, options: Options = NOTHING_ASKED, out: Path = OUT) -> None:
    """Measure how much of the All-to-All every architecture and schedule hides."""
    setting = options.setting()
    from experiments.bench.overlap.overlap_report import bench_overlap

    print(json.dumps(bench_overlap(setting, out)))


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
    """Measure what a slow network costs `scmoe train`, and what a shortcut hides of it.

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
    from experiments.bench.training.training import ARCHITECTURES, bench_train

    print(
        json.dumps(
            bench_train(
                config, overrides, share, ranks, rounds, rows or list(ARCHITECTURES), load, out
            )
        )
    )


@main.command
def inference(*, options: InferenceOptions = USUAL_INFERENCE, out: Path = OUT) -> None:
    """Measure prefill and decode between ranks, and generation with and without a cache."""
    from experiments.bench.inference.inference_report import bench_inference

    report = bench_inference(options.setting(), options.batch, options.new_tokens, out)
    print(json.dumps(report))


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
    """Draw one pair's operators, measured and planned (Fig. 7), and write Chrome traces.

    Args:
        run: draw the plan of this run with schedule=auto instead; nothing is measured
    """
    from experiments.bench.overlap import timeline

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
