"""This program replaces scmoe train in tests of the sweep around it: it starts at once and learns
nothing.

`python -m tests.support.toy_training SECONDS@RATE train CONFIG key=value ...`, or with `resume
RUN_DIR` in its place. At the learning rate RATE each step takes SECONDS; at others it takes no
time. Its val/loss is |log10 lr + 2| + 1 / step, and NaN in the last step for a learning rate of
0.5. A learning rate of 1 fails; SIGTERM saves and exits with 143.
"""

import csv
import math
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from scmoe.config.as_yaml import to_yaml
from scmoe.config.load import load_config


def main(pause: str, program: str, arguments: list[str]) -> int:
    pause_s, paused_lr = map(float, pause.split("@"))
    if program == "resume":
        run_dir = Path(arguments[0])
        config = load_config(run_dir / "config.yaml")
    else:
        config = load_config(arguments[0], arguments[1:])
        run_dir = Path(config.runs_dir) / config.name / uuid.uuid4().hex
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
    if config.optim.lr >= 1:
        print("FloatingPointError: [no] number", file=sys.stderr)
        return 1
    stopped: list[Any] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    metrics = run_dir / "metrics.csv"
    rows = (
        list(csv.reader(metrics.open(newline=""))) if metrics.exists() else [["step", "val/loss"]]
    )
    for step in range(len(rows) - 1, config.trainer.max_steps):
        loss = abs(math.log10(config.optim.lr) + 2) + 1 / (step + 1)
        diverged = config.optim.lr == 0.5 and step == config.trainer.max_steps - 1
        rows.append([str(step), str(math.nan if diverged else loss)])
        with metrics.with_suffix(".tmp").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        metrics.with_suffix(".tmp").rename(metrics)
        time.sleep(pause_s if config.optim.lr == paused_lr else 0)
        if stopped:
            (run_dir / "checkpoints" / f"step={step + 1}.ckpt").mkdir(parents=True)
            return 143
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
