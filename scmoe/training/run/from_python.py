"""Trains from a Python program or a notebook, on one rank or several. `scmoe.train` calls it.

One rank trains in the calling process, and so do the ranks of several machines and those that
torchrun or SLURM has started. Several ranks of one machine are started from here as `scmoe train`,
in a process of its own: the calling program must not run again for each rank, and a process that
has used CUDA cannot be forked. The new process's console output is passed on, so that a notebook
shows it.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scmoe.config.as_yaml import to_yaml
from scmoe.config.derived import shortened
from scmoe.config.fields import Config
from scmoe.lightning.stop import INTERRUPTED
from scmoe.training.run.machine import LAUNCHERS
from scmoe.training.run.train import checked_model, train

OF_A_RANK = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train_from_python(config: Config) -> Path | None:
    """Train and return the run directory; None on a rank other than 0 that torchrun or SLURM has
    started.

    Ctrl-C saves a checkpoint and raises KeyboardInterrupt. ConfigError: the configuration cannot
    run on this machine. RuntimeError: ranks that were started from here have failed; their output
    says why.
    """
    launched = any(launcher.detect() for launcher in LAUNCHERS.values())
    if config.trainer.devices == 1 or config.trainer.num_nodes > 1 or launched:
        summary = _train_here(config)
    else:
        checked_model(shortened(config))  # errors of the other process would be lines of text
        summary = _train_in_another_process(config)
    return None if summary is None else Path(summary["run_dir"]).absolute()


def _train_here(config: Config) -> dict[str, Any] | None:
    try:
        return train(config)
    except SystemExit as error:
        if error.code == INTERRUPTED:
            raise KeyboardInterrupt from error
        raise


def _train_in_another_process(config: Config) -> dict[str, Any]:
    others = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    paths = os.pathsep.join(path for path in sys.path if path)  # modules that this process finds
    with TemporaryDirectory(prefix="scmoe-") as folder:
        file = Path(folder, "config.yaml")
        file.write_text(to_yaml(config), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "scmoe", "train", str(file)],
            env=others | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert process.stdout is not None
        shown = threading.Thread(target=_pass_on, args=(process.stderr,), daemon=True)
        shown.start()
        try:
            summary = _summary_in(process.stdout)
            process.wait()
        except KeyboardInterrupt:
            # The process saves and ends. It may have received the Ctrl-C too, which asks the same.
            process.terminate()
            process.wait()
            raise
        finally:
            shown.join(timeout=10)
    if process.returncode:
        raise RuntimeError(
            f"The training has ended with exit code {process.returncode}. Its output says why."
        )
    return json.loads(summary)


def _summary_in(stream: Any) -> str:
    """Return the line with the summary, and print the others: an extension may print."""
    summary = ""
    for line in stream:
        if line.startswith('{"run_dir": '):
            summary = line
        else:
            print(line, end="", flush=True)
    return summary


def _pass_on(stream: Any) -> None:
    for line in stream:
        print(line, end="", file=sys.stderr, flush=True)
