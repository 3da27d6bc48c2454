import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from experiments.bench.other_settings import OffloadSetting
from experiments.bench.setting import check_folder
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.report import print_result, say

USUAL_OFFLOADING = OffloadSetting()


def main(
    number: Literal[0, 1, 4, 7, 8, 9, 10, 13, 22],
    /,
    *sources: str,
    out: Path | None = None,
    offloading: OffloadSetting = USUAL_OFFLOADING,
) -> None:
    """Draw a figure of the paper, or all of the docs. Standard output is JSON: the figure, its
    files.

    1   share of All-to-All in the time               reports of `bench overlap`, or their folder
    4   a pair of blocks with the shortcut            nothing
    7   two timelines by the cost model               nothing; `bench timeline` measures all five
    8   speed-ups in three hardware scenarios         reports of `bench overlap`, or their folder
    9   gating over training                          a run with analysis.gating_every
    10  similarity of representations (also 14, 15)   a run with analysis.similarity_every
    13  resident and offloaded experts                nothing: it is measured on this machine
    22  gradient's norm by depth (Eq. 22, no figure)  nothing: five architectures are trained
    0   all pictures, results pages, README's table   what is kept in docs/figures and docs/results

    PNG and PDF go to the folder `analysis` of the run, to that of the first report, or (0, 4, 7;
    PNG) to docs/figures. 9 and 10 also write what they draw, as JSON. 22 goes to runs/gradients. 13
    goes to runs/fig13; its JSON has the latency of each way. Its experts are in a file in the page
    cache, and its device is the memory of this process.

    Args:
        number: its number in the paper, or 0
        sources: what it is drawn from, as above
        out: folder of the files
    """
    if number in (0, 13, 22) and sources:
        raise ConfigError(f"Picture {number} is drawn from no source. Leave {sources[0]!r} out")
    if number != 13 and offloading != USUAL_OFFLOADING:
        raise ConfigError(f"Fig. {number} has no option but --out. Leave the options of 13 out")
    from scmoe.config.installation import require

    require("figure", "matplotlib")
    if number == 13:
        from experiments.bench.offload.figure_13 import bench_offload

        out = out or Path("runs/fig13")
        check_folder(out)
        measured = bench_offload(out, offloading)
        print_result({"figure": 13, **measured})
        return
    if number == 22:
        from experiments.figures.gradients import measure_gradients

        out = out or Path("runs/gradients")
        measure_gradients(out)
        say_files(22, [f"{out}/gradients.{end}" for end in ("json", "png")])
        return
    from docs.build.pages import write_pages
    from experiments.figures.measured import draw_figure

    files = draw_figure(number, sources, out) if number else write_pages(out)
    say_files(number, [str(path) for path in files])


def say_files(number: int, files: Sequence[str]) -> None:
    """Say which files were drawn, in words and as JSON."""
    say(f"drawn: {', '.join(files)}")
    print_result({"figure": number, "files": files})


if __name__ == "__main__":
    sys.exit(call("figure", *sys.argv[1:]))
