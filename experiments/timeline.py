"""`make timeline`: what one pair of blocks did, measured beside planned, in the manner of Fig. 7.

The five timelines of the figure run on shaped links as in `bench overlap`: top-2 sequential and pipelined, the shared
expert pipelined, ScMoE overlapped, and overlapped and pipelined. Written under --out: a Gantt chart of forward and one
of backward, and a Chrome trace of a training step of each (open it in ui.perfetto.dev), operators named scmoe/<name>.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scmoe.schedule.timeline import draw
from scmoe.testbed import links
from scmoe.testbed.pairs import Setting
from scmoe.testbed.profile import watch
from scmoe.testbed.ranks import run_ranks


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="timeline", description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=0.52, help="communication share of sequential top-2, forward")
    parser.add_argument("--compute", choices=["real", "emulated"], default="emulated")
    parser.add_argument("--position", choices=["pos1", "pos2", "pos3"], default="pos2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/timeline"))
    options = parser.parse_args(arguments)
    if not links.inside() and (missing := links.why_not()):
        print(f"error: links cannot be shaped here: {missing}", file=sys.stderr)
        return 2
    links.enter(["-m", "experiments.timeline", *arguments])
    setting = Setting(options.share, compute=options.compute)
    options.out.mkdir(parents=True, exist_ok=True)
    rate, timelines = run_ranks(
        watch, options.ranks, setting, options.position, str(options.out), timeout_s=900, own_links=True
    )[0]
    for direction in ("forward", "backward"):
        machine = f"{options.compute} compute, {options.ranks} ranks, links of {rate:.0f} Mbit/s"
        title = f"One pair from the tap to its end, {direction}: {machine}"
        path = options.out / f"{direction}.png"
        draw(timelines[direction], path, title, "ms")
        print(f"drawn: {path}")
    print(f"traces: {', '.join(str(path) for path in sorted(options.out.glob('*.json')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
