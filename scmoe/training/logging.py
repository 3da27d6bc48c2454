"""A run's directory, what it writes there, and its loggers.

    runs/<experiment>/<stamp>-<slug>/   config.yaml  overrides.txt  env.json  metrics.csv  summary.json
                                        checkpoints/  wandb/  wandb_run.json  state.json
    runs/latest                         the newest

Only rank 0 writes. Neither Weights & Biases nor a full disk ends a run while it logs (fault 32): what cannot be written
is left out, with one warning. Without room for its config a run does not start.
"""

from __future__ import annotations

import csv
import json
import netrc
import os
import platform
import re
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from scmoe.config_check import ConfigError
from scmoe.parallel.durable import MANIFEST
from scmoe.training import redact
from scmoe.training.steady import try_to_write, warn_once, write_aside


def create_run_dir(root: Path, experiment: str, overrides: Sequence[str], config_yaml: str) -> Path:
    """A new directory for a run, with all that is needed to run it again, but for keys."""
    overrides = without_keys(overrides)
    pairs = [o.removeprefix("--").partition("=")[::2] for o in overrides]
    told = [f"{key.rpartition('.')[2]}-{value}" for key, value in pairs if key not in ("name", "runs_dir")]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(told))[:40].strip("-.")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = root / experiment / f"{stamp}-{slug or uuid.uuid4().hex[:4]}"
    while run_dir.exists():
        run_dir = run_dir.with_name(f"{stamp}-{slug}-{uuid.uuid4().hex[:4]}")
    run_dir.mkdir(parents=True)
    write_config(run_dir, config_yaml)
    (run_dir / "overrides.txt").write_text("".join(f"{o}\n" for o in overrides))
    (run_dir / "env.json").write_text(json.dumps(environment(), indent=2))
    point_latest(root, run_dir)
    return run_dir


def write_config(run_dir: Path, config_yaml: str) -> None:
    """OSError: the disk is full or the like; a config that was there is whole."""
    write_aside(run_dir / "config.yaml", lambda path: path.write_text(config_yaml))


def point_latest(root: Path, run_dir: Path) -> None:
    """runs/latest -> run_dir, in one step for anyone who looks."""
    fresh = root / f".latest-{uuid.uuid4().hex[:8]}"
    fresh.symlink_to(run_dir.resolve().relative_to(root.resolve()))
    os.replace(fresh, root / "latest")


def environment() -> dict[str, Any]:
    """Command line, versions, machine and the state of the code. No environment variables: they hold keys, which are
    starred out of the rest."""
    packages = {}
    for name in ("scmoe", "torch", "lightning", "omegaconf", "wandb", "numpy", "tokenizers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": without_keys([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": packages,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff": without_keys(_git("diff", "HEAD")),
    }


def without_keys(value: Any) -> Any:
    """A text, a config or the like as it may be kept; see redact.py."""
    return redact.without_keys(value, os.environ)


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------------- loggers


def csv_logger(run_dir: Path, resumed_step: int | None) -> CSVLogger:
    """metrics.csv; a resumed run keeps its rows up to the step it goes on from (Lightning's logger deletes the
    file)."""
    path, kept = run_dir / "metrics.csv", []
    if resumed_step is not None and path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) < resumed_step]
    logger = SteadyCSVLogger(run_dir, name="", version="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")
        writer = logger.experiment
    if kept:
        writer.metrics_keys, writer.metrics = list(kept[0]), kept
        logger.save()
    return logger


class SteadyCSVLogger(CSVLogger):
    """Keeps rows in memory, with one warning, while the disk does not take them; Lightning's would end the training,
    and leave half a row, or half a file where a new column came."""

    def save(self) -> None:
        writer, path = self.experiment, Path(self.experiment.metrics_file_path)
        before, keys = path.read_bytes() if path.exists() else None, list(writer.metrics_keys)
        try:
            super().save()
        except OSError as error:
            writer.metrics_keys = keys
            with suppress(OSError):
                path.unlink(missing_ok=True) if before is None else path.write_bytes(before)
            warn_once(f"{path} takes no more rows for now: {error.strerror or error}")


INIT_TIMEOUT_S = 20.0  # of a server that does not answer
FINISH_TIMEOUT_S = 60.0  # of the last uploads; what is left over is kept in the run directory
UPLOAD_BYTES_PER_S = 1e6  # the slowest at which a checkpoint is waited for
WANDB_TROUBLE = (wandb.Error, OSError)  # the server refuses, does not answer, or W&B's own process is gone


def wandb_mode(mode: Literal["auto", "online", "offline"]) -> Literal["online", "offline"]:
    """`auto` is online where a key is found and offline elsewhere; W&B itself would ask, or raise."""
    if mode == "auto":
        return "online" if has_wandb_key() else "offline"
    return mode


def has_wandb_key() -> bool:
    """Where W&B would find one: in the environment, or in netrc under the server's name and port."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_logger(
    run_dir: Path,
    mode: Literal["online", "offline"],
    project: str,
    group: str | None,
    tags: Sequence[str],
    config: dict[str, Any],
    may_go_offline: bool = False,
) -> WandbLogger:
    """A W&B run that a resumed training continues: its id is written before training starts.

    may_go_offline: where the server cannot be reached, else ConfigError, as what was asked for cannot be had.
    """
    project, group, tags, config = without_keys((project, group, list(tags), config))
    record = run_dir / "wandb_run.json"
    if record.exists():
        run_id = json.loads(record.read_text())["id"]
    else:
        run_id = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]  # an agent of a sweep gives its trial an id
        text = json.dumps({"id": run_id, "project": project, "mode": mode})
        try_to_write(record, lambda path: path.write_text(text))
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        x_disable_meta=without_keys(sys.argv) != sys.argv,  # it has the command line as it is
    )
    wandb.setup(settings)  # silent from here on: what matters is said below, once
    common: dict[str, Any] = dict(
        project=project,
        name=f"{run_dir.parent.name}/{run_dir.name}",
        id=run_id,
        group=group,
        tags=tags,
        dir=str(run_dir),
        resume="allow",
        config=config,
        settings=settings,
    )
    try:
        run = wandb.init(mode=mode, **common)
    except WANDB_TROUBLE as error:
        reason = str(error).splitlines()[0]
        if mode == "offline" or not may_go_offline:
            raise ConfigError(f"logger.mode is {mode}, allowed here: offline | disabled: {reason}") from error
        print(f"warning: Weights & Biases goes offline: {reason}", file=sys.stderr, flush=True)
        wandb.teardown()  # else its process still takes the id for one in use
        run = wandb.init(mode="offline", **common)
    return SteadyWandbLogger(experiment=run)


class SteadyWandbLogger(WandbLogger):
    """Gives up with one warning where Lightning's would end the training: W&B's process may be killed."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(lambda: super(SteadyWandbLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        self._try(lambda: super(SteadyWandbLogger, self).log_hyperparams(params))

    def log_checkpoint(self, checkpoint: Path, metric: str, value: float) -> None:
        """An artifact of type model with the alias `best`. Online it is waited for; offline, `wandb sync` reads the
        files where they lie."""
        self._try(lambda: self._upload(checkpoint, metric, value), (Exception,))  # the client lets any kind through

    def _upload(self, checkpoint: Path, metric: str, value: float) -> None:
        metadata = {"step": json.loads((checkpoint / MANIFEST).read_text())["step"], metric: value}
        artifact = wandb.Artifact(f"checkpoint-{self.experiment.id}", type="model", metadata=metadata)
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        for path in files:  # immutable: W&B makes no copy
            artifact.add_file(str(path), str(path.relative_to(checkpoint)), policy="immutable", skip_cache=True)
        logged = self.experiment.log_artifact(artifact, aliases=["best"])
        if not self.experiment.offline:
            size = sum(path.stat().st_size for path in files)
            logged.wait(timeout=int(FINISH_TIMEOUT_S + size / UPLOAD_BYTES_PER_S))

    def close(self, status: str) -> None:
        finish = partial(self.experiment.finish, exit_code=0 if status == "success" else 1)
        if self.lost:  # its process may still be there, and must not outlive this one
            with suppress(*WANDB_TROUBLE):
                finish()
        else:
            self._try(finish)

    def _try(self, action: Callable[[], None], trouble: tuple[type[Exception], ...] = WANDB_TROUBLE) -> None:
        if self.lost:
            return
        try:
            action()
        except trouble as error:
            self.lost = True
            reason, kept = f"{error} ".splitlines()[0].strip(" ."), Path(self.experiment.settings.sync_dir)
            print(
                f"warning: Weights & Biases gets no more of this run: {reason}; to send it later: wandb sync {kept}",
                file=sys.stderr,
                flush=True,
            )


def log_best_checkpoint(loggers: Sequence[Logger], callbacks: Iterable[object]) -> None:
    """Hands the best checkpoint to W&B, with its step and metric, where there is one and W&B is on."""
    best = [c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor and c.best_model_path]
    for logger, callback in product(loggers, best):
        if isinstance(logger, SteadyWandbLogger):
            assert callback.best_model_score is not None
            value = callback.best_model_score.item()
            logger.log_checkpoint(Path(callback.best_model_path), str(callback.monitor), value)


def sync_command(run_dir: Path) -> str | None:
    """How to send an offline run to W&B; None where there is none."""
    offline = sorted((run_dir / "wandb").glob("offline-run-*"))
    return f"wandb sync {' '.join(map(str, offline))}" if offline else None


def describe(logger: Logger) -> str:
    if isinstance(logger, WandbLogger):
        return f"Weights & Biases, {'offline' if logger.experiment.offline else 'online'}"
    return "metrics.csv"


def close_loggers(loggers: Sequence[Logger], status: str = "success") -> None:
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, SteadyWandbLogger):
            logger.close(status)
