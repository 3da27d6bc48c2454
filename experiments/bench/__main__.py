"""`scmoe bench` measures on this machine what one rank does, and pairs of blocks between ranks.

A setting is a command line. Each command imports its measurement inside the function, so that help
and refusals come at once.
"""

import sys
from pathlib import Path
from typing import Literal

from cyclopts import App

from experiments.bench.other_settings import (
    InferenceSetting,
    LayerSetting,
    TimelineSetting,
    TrainingSetting,
)
from experiments.bench.setting import OVERLAP_OPTIONS, Setting, check_folder
from experiments.engine import links
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.report import print_result

OUT, TIMELINE = Path("runs/bench"), Path("runs/timeline")
USUAL_OVERLAP = Setting()
USUAL_LAYER = LayerSetting()
USUAL_TRAINING = TrainingSetting()
USUAL_INFERENCE = InferenceSetting()
USUAL_TIMELINE = TimelineSetting()
main = App(
    name="bench",
    help="Measure on this machine. Standard output is JSON, but nothing at a terminal.",
)


@main.command
def layer(*, setting: LayerSetting = USUAL_LAYER) -> None:
    """Measure the time of the MoE layer over that of its dense products."""
    from experiments.bench.layer import bench_layer

    print_result(bench_layer(setting))


@main.command(group_parameters=OVERLAP_OPTIONS)
def overlap(*, setting: Setting = USUAL_OVERLAP, out: Path = OUT) -> None:
    """Measure how much of the All-to-All every architecture and schedule hides."""
    from experiments.bench.overlap.speedups import bench_overlap

    check_folder(out)
    print_result(bench_overlap(setting, out))


@main.command
def train(*overrides: str, setting: TrainingSetting = USUAL_TRAINING, out: Path = OUT) -> None:
    """Measure what a slow network costs `scmoe train`, and what a shortcut hides of it.

    Args:
        overrides: key=value, of the config
    """
    links.require()
    from experiments.bench.training.slow_network import bench_train

    check_folder(out)
    print_result(bench_train(setting, overrides, out))


@main.command
def inference(*, setting: InferenceSetting = USUAL_INFERENCE, out: Path = OUT) -> None:
    """Measure prefill and decode between ranks, and generation with and without a cache."""
    from experiments.bench.inference.gains import bench_inference

    check_folder(out)
    print_result(bench_inference(setting, out))


@main.command
def timeline(
    *, setting: TimelineSetting = USUAL_TIMELINE, run: Path | None = None, out: Path = TIMELINE
) -> None:
    """Draw one pair's operators, measured and planned (Fig. 7), and write Chrome traces.

    Args:
        run: draw the plan of this run with schedule=auto instead; nothing is measured
    """
    from experiments.bench.overlap import timeline

    if run is not None:
        if (setting, out) != (USUAL_TIMELINE, TIMELINE):
            raise ConfigError(
                "--run draws the plan of a run and measures nothing. Leave the other options out"
            )
        return print_result(timeline.draw_plan(run))
    links.require()
    check_folder(out)
    print_result(timeline.bench_timeline(setting, out))


@main.command
def gpu(
    *,
    out: Path | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    tiny: bool = False,
    parts: list[str] | None = None,
) -> int:
    """Check scmoe on one GPU, in nine minutes at most: tests, speed of the layer, overlap,
    GPT2-MoE-Small, a short training.

    Each part runs in its own process with its own clock. The folder gets report.md, results.json,
    pictures and traces, at most 8 files. Standard output is JSON with the state of each part; the
    exit code is 0 if all are ok.

    Args:
        out: a new or empty folder (default: runs/gpu-check/ and the time)
        device: cpu: a trial, with --tiny
        tiny: tiny sizes: shows that the check runs, and no speed
        parts: run these parts only
    """
    from experiments.bench.gpu.check import check_gpu

    return check_gpu(device, tiny, out, parts)


if __name__ == "__main__":
    sys.exit(call("bench", *sys.argv[1:]))
