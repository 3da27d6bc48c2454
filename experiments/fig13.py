"""Measure Fig. 13 on this machine: latency and memory of resident and offloaded experts. The last line is JSON.

Experts are in a file in the page cache, and the device is this process's memory. --quick tries the command in seconds;
its figures say nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.experiments import command, parser

ARCHITECTURES = ("scmoe_pos1", "scmoe_pos2", "scmoe_pos3", "shared_expert", "top2")


@command
def main(arguments: list[str]) -> None:
    options = parser("fig13", __doc__)
    options.add_argument("--quick", action="store_true", help="a tiny model, two rounds, every time kept")
    options.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, help="(default: all)")
    options.add_argument("--tokens", nargs="+", type=int, help="tokens of a forward pass (default: 1 4 64)")
    options.add_argument("--rounds", type=int, help="times to keep of each way (default: 15)")
    options.add_argument("--limit-s", type=float, help="seconds for each case (default: 10)")
    options.add_argument("--out", type=Path, default=Path("runs/fig13"), help="folder (default: %(default)s)")
    given = vars(options.parse_args(arguments))
    quick, out = given.pop("quick"), given.pop("out")
    chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    if bad := [name for name, value in chosen.items() if name != "architectures" and min(flat(value)) <= 0]:
        raise ConfigError(f"--{bad[0].replace('_', '-')} is {given[bad[0]]}, allowed: above 0")
    from scmoe.testbed.offload import Setting
    from scmoe.testbed.offload_report import QUICK, bench_offload

    settings: dict[str, Any] = (QUICK if quick else {}) | chosen
    print(json.dumps(bench_offload(out, Setting(**settings))))


def flat(value: Any) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
