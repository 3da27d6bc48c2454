"""`scmoe fig13` measures offloaded experts."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from scmoe.config.leaves import ConfigError
from scmoe.experiments.engine.command_line import call

Architecture = Literal["scmoe_pos1", "scmoe_pos2", "scmoe_pos3", "shared_expert", "top2"]


def main(
    *,
    quick: bool = False,
    architectures: list[Architecture] | None = None,
    tokens: list[int] | None = None,
    rounds: int | None = None,
    limit_s: float | None = None,
    out: Path = Path("runs/fig13"),
) -> None:
    """Measure Fig. 13 on this machine: latency and memory of resident and offloaded experts. Standard output is JSON.

    Experts are in a file in the page cache, and the device is this process's memory.

    Args:
        quick: a tiny model, two rounds, every time kept: tries the command in seconds, and its figures say nothing
        architectures: (default: all)
        tokens: tokens of a forward pass (default: 1 4 64)
        rounds: times to keep of each way (default: 15)
        limit_s: seconds for each case (default: 10)
        out: folder
    """
    above_0: dict[str, Any] = {"tokens": tokens, "rounds": rounds, "limit_s": limit_s}
    given = {name: tuple(sorted(set(v))) if isinstance(v, list) else v for name, v in above_0.items() if v is not None}
    if bad := [name for name, value in given.items() if min(value if isinstance(value, tuple) else (value,)) <= 0]:
        raise ConfigError(f"--{bad[0].replace('_', '-')} is {above_0[bad[0]]}, allowed: above 0")
    if architectures is not None:
        given["architectures"] = tuple(architectures)
    from scmoe.experiments.bench.offload import QUICK, Setting, bench_offload

    settings: dict[str, Any] = (QUICK if quick else {}) | given
    print(json.dumps(bench_offload(out, Setting(**settings))))


if __name__ == "__main__":
    sys.exit(call("fig13", *sys.argv[1:]))
