"""Trainings of one process that are clients of a W&B server on 127.0.0.1."""

import contextlib
import faulthandler
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support.commands import ROOT, environment
from tests.support.forked import python
from tests.support.wandb_server import KEY, WandbServer

LONGEST_S = 400  # of all trainings; after it, the stacks of all threads say what waits
DEBUG = ("configs/debug.yaml", "logger.project=wire", "logger.group=together", "logger.tags=[a,b]")


@contextlib.contextmanager
def client(server: WandbServer) -> Iterator[None]:
    """Make this process a client of the server. W&B reads its environment variables once."""
    import wandb

    wandb.teardown()
    os.environ |= server.variables
    yield
    wandb.teardown()


class LoggedTrainings:
    """Writes into a folder, for each training, what the server received and what the training
    printed."""

    def __init__(self, folder: Path) -> None:
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
        self.folder = folder

    def report(self, name: str, server: WandbServer, **more: Any) -> None:
        artifacts = [asdict(artifact) for artifact in server.artifacts]
        for artifact in artifacts:
            artifact["files"] = {file: len(content) for file, content in artifact["files"].items()}
        found = {
            "runs": [asdict(run) for run in server.runs.values()],
            "artifacts": artifacts,
            **more,
        }
        (self.folder / f"{name}.json").write_text(json.dumps(found))

    def train(
        self, server: WandbServer, name: str, *overrides: str, run_dir: Path | None = None
    ) -> str:
        """Return what the training printed. run_dir: of a run to be resumed."""
        from scmoe.config.load import load_config
        from scmoe.training.run import train as run
        from scmoe.training.run.resume import resumption

        said = io.StringIO()
        with (
            client(server),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            if run_dir is None:
                runs_dir = f"runs_dir={self.folder / name}"
                config = load_config(DEBUG[0], [*DEBUG[1:], runs_dir, *overrides])
                resumed = None
            else:
                config, resumed = resumption(run_dir, overrides)
            summary = run.train(config, (), resumed)
        self.report(name, server, summary=summary, said=said.getvalue())
        return said.getvalue()

    def command(self, server: WandbServer, *words: str) -> tuple[int, str]:
        """Return the exit code and the output. That is a file, as W&B's own processes may keep a
        pipe open after their parent has ended."""
        log, env = self.folder / "command.log", {**os.environ, **server.variables}
        with log.open("wb") as file:
            done = subprocess.run(
                [sys.executable, "-m", *words], cwd=self.folder, env=env, stdout=file, stderr=file
            )
        return done.returncode, log.read_text()


def reports_of(module: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a module, run as a program, has written into the folder. No file there has the
    API key."""
    ended, *said = python(
        *("-m", module, str(folder)), cwd=ROOT, env=environment(), timeout_s=LONGEST_S + 60
    )
    (folder / "scenario.log").write_text("".join(said))
    assert ended == 0, said
    assert not [
        path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def warnings(report: dict[str, Any]) -> list[str]:
    """Return the lines that say that something went wrong; the printed config and summary have
    other words with `error`."""
    lines = report["said"].splitlines()
    return [line for line in lines if "warn" in line.lower() or line.lower().startswith("error")]


def column(run: dict[str, Any], metric: str) -> list[Any]:
    return [row[metric] for row in run["history"] if metric in row]


def losses(run: dict[str, Any]) -> list[list[Any]]:
    return [column(run, name) for name in ("train/loss", "val/loss")]


def of_type(report: dict[str, Any], *types: str) -> list[dict[str, Any]]:
    return [artifact for artifact in report["artifacts"] if artifact["type"] in types]


def result(report: dict[str, Any]) -> dict[str, Any]:
    """Return the summary without what is measured of the run."""
    measured = ("run_dir", "tokens_per_s", "model_tflops", "peak_host_gib")
    return {key: value for key, value in report["summary"].items() if key not in measured}
