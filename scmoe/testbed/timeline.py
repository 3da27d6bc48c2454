"""One pair's operators, measured and planned, as charts in the manner of Fig. 7.

The five timelines of the figure run on shaped links as in `bench overlap`: top-2 sequential and pipelined, the shared
expert pipelined, ScMoE overlapped, and overlapped and pipelined.
"""

from pathlib import Path
from typing import Any

from scmoe.schedule.timeline import draw
from scmoe.testbed.pairs import Setting
from scmoe.testbed.profile import watch
from scmoe.testbed.ranks import run_ranks


def bench_timeline(share: float, compute: str, position: str, ranks: int, out: Path) -> dict[str, Any]:
    """Write a Gantt chart of forward and one of backward into `out`, and a Chrome trace of a training step of each
    timeline, operators named scmoe/<name> (open it in ui.perfetto.dev).

    share: communication share of sequential top-2, forward. The caller has entered a network namespace (links.py).
    """
    setting = Setting(share, compute=compute)
    out.mkdir(parents=True, exist_ok=True)
    rate, timelines = run_ranks(watch, ranks, setting, position, str(out), timeout_s=900, own_links=True)[0]
    for direction in ("forward", "backward"):
        machine = f"{compute} compute, {ranks} ranks, links of {rate:.0f} Mbit/s"
        path = out / f"{direction}.png"
        draw(timelines[direction], path, f"One pair from the tap to its end, {direction}: {machine}", "ms")
        print(f"drawn: {path}")
    traces = [str(path) for path in sorted(out.glob("*.json"))]
    print(f"traces: {', '.join(traces)}")
    return {"link_mbit": rate, "traces": traces}
