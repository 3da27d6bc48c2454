import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from experiments.bench.options import Count, Positive
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError

Architecture = Literal["scmoe_pos1", "scmoe_pos2", "scmoe_pos3", "shared_expert", "top2"]


@Parameter(name="*")
@dataclass(frozen=True)
class Offloading:
    """The options of Fig. 13.

    Args:
        quick: of 13: a tiny model, two rounds, every time kept: tries the command in seconds, and
            its figures say nothing
        architectures: of 13 (default: all)
        tokens: of 13: tokens of a forward pass (default: 1 4 64)
        rounds: of 13: times to keep of each way (default: 15)
        limit_s: of 13: seconds for each case (default: 10)
    """

    quick: bool = False
    architectures: list[Architecture] | None = None
    tokens: list[Count] | None = None
    rounds: Count | None = None
    limit_s: Positive | None = None


NOTHING_ASKED = Offloading()


def main(
    number: Literal[0, 1, 4, 7, 8, 9, 10, 13],
    /,
    *sources: str,
    out: Path | None = None,
    offloading: Offloading = NOTHING_ASKED,
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
    0   all pictures and pages of results             what is kept in docs/figures and docs/results

    PNG and PDF go to the folder `analysis` of the run, to that of the first report, or (0, 4, 7;
    PNG) to docs/figures. 9 and 10 also write what they draw, as JSON. 13 goes to runs/fig13; its
    JSON has the latency of each way. Its experts are in a file in the page cache, and its device is
    the memory of this process.

    Args:
        number: its number in the paper, or 0
        sources: what it is drawn from, as above
        out: folder of the files
    """
    if number in (0, 13) and sources:
        raise ConfigError(f"Picture {number} is drawn from no source. Leave {sources[0]!r} out")
    if number != 13 and offloading != NOTHING_ASKED:
        raise ConfigError(f"Fig. {number} has no option but --out. Leave the options of 13 out")
    from scmoe.config.extras import require

    require("figure", "matplotlib")
    if number == 13:
        print(json.dumps(measure_offloading(offloading, out or Path("runs/fig13"))))
        return
    from docs.build.pages import write_pages
    from experiments.figures.measured import draw_figure

    files = draw_figure(number, sources, out) if number else write_pages(out)
    print(json.dumps({"figure": number, "files": [str(path) for path in files]}))


def measure_offloading(asked: Offloading, out: Path) -> dict[str, object]:
    """Measure and draw Fig. 13. Return the figures of each way."""
    from experiments.bench.offload.offload import QUICK, OffloadSetting
    from experiments.bench.offload.offload_report import bench_offload

    setting = QUICK if asked.quick else OffloadSetting()
    if asked.architectures is not None:
        setting = replace(setting, architectures=tuple(asked.architectures))
    if asked.tokens is not None:
        setting = replace(setting, tokens=tuple(sorted(set(asked.tokens))))
    if asked.rounds is not None:
        setting = replace(setting, rounds=asked.rounds)
    if asked.limit_s is not None:
        setting = replace(setting, limit_s=asked.limit_s)
    return {"figure": 13, **bench_offload(out, setting)}


if __name__ == "__main__":
    sys.exit(call("figure", *sys.argv[1:]))
