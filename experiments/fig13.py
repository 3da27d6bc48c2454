import json
import sys
from pathlib import Path
from typing import Any, Literal

from experiments.bench.pairs import Count, Positive
from scmoe.command_line import call

Architecture = Literal["scmoe_pos1", "scmoe_pos2", "scmoe_pos3", "shared_expert", "top2"]


def main(
    *,
    quick: bool = False,
    architectures: list[Architecture] | None = None,
    tokens: list[Count] | None = None,
    rounds: Count | None = None,
    limit_s: Positive | None = None,
    out: Path = Path("runs/fig13"),
) -> None:
    """Measure Fig. 13 on this machine: latency and memory of resident and offloaded experts.
    Standard output is JSON.

    Experts are in a file in the page cache, and the device is this process's memory.

    Args:
        quick: a tiny model, two rounds, every time kept: tries the command in seconds, and its
            figures say nothing
        architectures: (default: all)
        tokens: tokens of a forward pass (default: 1 4 64)
        rounds: times to keep of each way (default: 15)
        limit_s: seconds for each case (default: 10)
        out: folder
    """
    from experiments.bench.offload import QUICK, Setting, bench_offload

    given: dict[str, Any] = {"rounds": rounds, "limit_s": limit_s}
    given["architectures"] = None if architectures is None else tuple(architectures)
    given["tokens"] = None if tokens is None else tuple(sorted(set(tokens)))
    settings = (QUICK if quick else {}) | {
        name: value for name, value in given.items() if value is not None
    }
    print(json.dumps(bench_offload(out, Setting(**settings))))


if __name__ == "__main__":
    sys.exit(call("fig13", *sys.argv[1:]))
