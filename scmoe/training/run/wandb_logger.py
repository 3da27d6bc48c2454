"""The logger of W&B: its mode and key, the run that it writes to, and what it gets beside metrics.

Once training has started it does not end a run: after the first error it stops with one warning
(fault 32).
"""

import math
import netrc
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from scmoe.config.fields import Config
from scmoe.config.installation import require
from scmoe.config.leaves import ConfigError, show
from scmoe.files import read_json, redacted, try_to_write_json, warn_once
from scmoe.parallel.checkpoint.durable import read_manifest
from scmoe.report import say
from scmoe.training.run.directory import git, read_metrics

HAS_WANDB = True
WANDB_TROUBLE: tuple[type[Exception], ...] = (OSError,)
try:
    import wandb

    # The server refuses or does not answer, or W&B's own process is gone.
    WANDB_TROUBLE = (wandb.Error, OSError)
except ImportError:  # it is not installed, or an installation is damaged
    HAS_WANDB = False

DEFAULT_SERVER = "https://api.wandb.ai"
INIT_TIMEOUT_S = 20.0  # how long a server may take to answer
FINISH_TIMEOUT_S = 60.0  # limit of the last uploads; the rest stays in the run directory
UPLOAD_BYTES_PER_S = 1e6  # an upload of a checkpoint that is slower is not waited for
STEP_METRIC = "trainer/global_step"
BEST_IN_SUMMARY = {  # metrics of which W&B's summary has the best value too, as `val/loss_min`
    **dict.fromkeys(("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte"), "min"),
    "val/accuracy": "max",
}

# Of summary.json, what no row of metrics has: W&B's summary shows it.
OF_RUN = ("params_total", "params_active", "tokens_per_s", "images_per_s")


def has_wandb_key() -> bool:
    """Return whether there is a key where W&B looks for it: in the environment, and in netrc under
    the server's name and port."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL") or DEFAULT_SERVER).netloc
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_mode(config: Config) -> str:
    """Return logger.mode; for `auto` WANDB_MODE, where it is set, and `disabled` where W&B is not
    installed.

    ConfigError: W&B's environment variables have wrong values, or the mode is another one and W&B
    is not installed.
    """
    mode = os.environ.get("WANDB_MODE") or "auto"
    if mode not in ("online", "offline", "disabled", "auto"):
        raise ConfigError(f"WANDB_MODE is {show(mode)}, allowed: online | offline | disabled")
    mode = mode if config.logger.mode == "auto" else config.logger.mode
    if not HAS_WANDB and mode == "auto":
        return "disabled"
    if mode != "disabled":
        require(f"logger.mode={mode}", "wandb")
        import_module("wandb")  # raises what is wrong with a damaged installation
        check_wandb_server()
    return mode


def check_wandb_server() -> None:
    """Raise ConfigError if WANDB_BASE_URL is no address of a server."""
    url = os.environ.get("WANDB_BASE_URL") or DEFAULT_SERVER
    try:
        server = urlparse(url)
        _ = server.port
        is_address = server.scheme in ("http", "https") and bool(server.hostname)
    except ValueError:  # brackets, or a port that is no number
        is_address = False
    if not is_address:
        raise ConfigError(
            f"WANDB_BASE_URL is {show(url)}, which is no address of a server. Give one such as"
            f" {DEFAULT_SERVER}, or unset it."
        )


def check_wandb(config: Config, needs_key: bool) -> None:
    """Raise ConfigError if W&B cannot run in its mode.

    needs_key: whether this process logs (rank 0). The mode online then requires a key.
    """
    if wandb_mode(config) == "online" and needs_key and not has_wandb_key():
        way = "logger.mode" if config.logger.mode == "online" else "WANDB_MODE"
        raise ConfigError(
            f"{way} is online, but no key of Weights & Biases is found. Call `wandb login` or set "
            "WANDB_API_KEY, or use logger.mode=offline."
        )


def wandb_project(config: Config) -> str:
    """Return logger.project, else WANDB_PROJECT, else scmoe."""
    return config.logger.project or os.environ.get("WANDB_PROJECT") or "scmoe"


def wandb_logger(run_dir: Path, config: Config) -> "SafeWandbLogger":
    """Return the logger of a W&B run, the same one when a training is resumed: its id is kept in
    the run directory.

    config: without keys and passwords, as W&B shows it. The mode `auto` is online if a key is found
    and the server answers, else offline. ConfigError: W&B cannot start in another mode.
    """
    mode = wandb_mode(config)
    logger = config.logger
    # Without a key, W&B would ask for one, or raise.
    offline = mode == "offline" or (mode == "auto" and not has_wandb_key())
    resolved: Literal["online", "offline"] = "offline" if offline else "online"
    record = run_dir / "wandb_run.json"
    # The variables may have changed since, and a sweep decides the id, the project and the entity
    # of its trials.
    kept = read_json(record)
    run_id = kept.get("id") or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
    project = logger.project or kept.get("project") or wandb_project(config)
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,  # it would upload the changes to the code, keys too
        git_commit=git("rev-parse", "HEAD"),
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        # W&B's metadata contain the command line, with its keys.
        x_disable_meta=redacted(sys.argv) != sys.argv,
    )
    wandb.setup(settings)  # silent from here on; the messages below are enough
    start = partial(  # for None W&B reads its own variable: WANDB_ENTITY, WANDB_TAGS, ...
        wandb.init,
        entity=logger.entity or kept.get("entity"),
        project=project,
        name=os.environ.get("WANDB_NAME") or f"{run_dir.parent.name}/{run_dir.name}",
        id=run_id,
        group=logger.group,
        job_type=logger.job_type or os.environ.get("WANDB_JOB_TYPE") or "train",
        notes=logger.notes,
        tags=logger.tags or None,
        dir=str(run_dir),
        resume="allow",
        config=asdict(config),
        settings=settings,
    )
    try:
        run = start(mode=resolved)
    except WANDB_TROUBLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if mode != "auto" or offline:
            way = "WANDB_MODE" if logger.mode == "auto" and mode != "auto" else "logger.mode"
            raise ConfigError(
                f"{way} is {resolved}, allowed here: offline | disabled: {reason}"
            ) from error
        say(f"warning: Weights & Biases goes offline: {reason}")
        wandb.teardown()  # otherwise its process would see the id as in use
        run = start(mode="offline")
    kept = {
        "id": run_id,
        "project": run.project or project,
        "entity": run.entity or None,
        "mode": resolved,
    }
    try_to_write_json(record, kept)
    run.define_metric(STEP_METRIC)
    run.define_metric("*", step_metric=STEP_METRIC, step_sync=True)  # the x axis of every chart
    wandb_run = SafeWandbLogger(experiment=run)
    for row in read_metrics(run_dir):
        wandb_run.keep_best({name: float(row[name]) for name in BEST_IN_SUMMARY if row.get(name)})
    return wandb_run


class SafeWandbLogger(WandbLogger):
    """Stops logging with one warning where Lightning's logger would end the training, for example
    when W&B's process dies."""

    lost = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.best: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(partial(super().log_metrics, metrics, step))
        self.attempt(partial(self.keep_best, metrics))

    def keep_best(self, metrics: Mapping[str, float]) -> None:
        """Keep the best values of BEST_IN_SUMMARY in the run's summary, each as a number under a
        name of its own.

        W&B's own way, `define_metric(summary="min")`, makes the summary of `val/loss` a mapping, by
        which W&B can neither sort runs nor choose the best trial of a sweep.
        """
        for name in BEST_IN_SUMMARY.keys() & metrics.keys():
            value = float(metrics[name])
            best = self.best.get(name)
            is_better = best is None or (
                value < best if BEST_IN_SUMMARY[name] == "min" else value > best
            )
            if is_better and math.isfinite(value):
                self.best[name] = value
                self.experiment.summary[f"{name}_{BEST_IN_SUMMARY[name]}"] = value

    def log_hyperparams(self, params: Any) -> None:
        self.attempt(partial(super().log_hyperparams, params))

    def log_inputs(self, config: Config, state: Mapping[str, Any]) -> None:
        """Log the data set and the tokenizer of a training, by names and hashes.

        config: without keys and passwords. state: of the datamodule.
        """
        data = config.data
        name = str(data.path) if data.name == "hf" else data.name
        inputs = {"dataset": {"name": name, "subset": data.subset, "content": state.get("data")}}
        if "tokenizer" in state:
            name = data.tokenizer
            if name not in ("bpe", "gpt2"):
                name = Path(name).name
            inputs["tokenizer"] = {"name": name, "content": state["tokenizer"]}
        for kind, facts in inputs.items():
            self.attempt(partial(_log_input, self.experiment, kind, facts), (Exception,))

    def log_results(
        self,
        step: int,
        samples: Sequence[str],
        load: Path,
        summary: Mapping[str, Any],
        callbacks: Iterable[object],
    ) -> None:
        """Log what a run has at its end: its size and speed, texts of its model, the heat map of
        its experts, and the best checkpoint with its metric."""
        of_run = {key: summary[key] for key in OF_RUN if summary.get(key) is not None}
        self.attempt(partial(self.experiment.summary.update, of_run))
        shown: dict[str, Any] = {}
        if samples:
            shown["samples"] = wandb.Table(["step", "text"], [[step, text] for text in samples])
        if load.exists():
            shown["moe/expert_load"] = wandb.Image(str(load))
        for key, value in shown.items():
            self.attempt(
                partial(self.experiment.log, {key: value, STEP_METRIC: step}), (Exception,)
            )
        for callback in callbacks:
            if not isinstance(callback, ModelCheckpoint) or not callback.monitor:
                continue
            # There is no score where a resumed run has not validated and the best checkpoints are
            # gone.
            if callback.best_model_score is not None:
                best = Path(callback.best_model_path)
                score = {callback.monitor: callback.best_model_score.item()}
                self.attempt(partial(_log_checkpoint, self.experiment, best, score), (Exception,))

    def close(self, status: str) -> None:
        """End the W&B run. status: success or failed."""
        finish = partial(self.experiment.finish, exit_code=0 if status == "success" else 1)
        if self.lost:  # W&B's process may still run, and must not outlive this one
            with suppress(Exception):
                finish()
        else:  # when its process dies, the client raises errors of other kinds
            self.attempt(finish, (Exception,))

    def attempt(
        self, action: Callable[[], object], trouble: tuple[type[Exception], ...] = WANDB_TROUBLE
    ) -> None:
        """Do what W&B may refuse. After the first error, do nothing."""
        if self.lost:
            return
        try:
            action()
        except trouble as error:
            self.lost = True
            reason = f"{error} ".splitlines()[0].strip(" .")
            folder = Path(self.experiment.settings.sync_dir)
            # As a new run: otherwise the rows that have arrived would come twice.
            again = f"wandb sync --include-online --id {uuid.uuid4().hex[:8]} {folder}"
            warn_once(
                f"Weights & Biases receives nothing more of this run: {reason}; to upload all of"
                f" it: {again}"
            )


def _log_input(run: Any, kind: str, facts: Mapping[str, Any]) -> None:
    """Log an artifact that says which data set, or tokenizer, the run reads. It holds these facts
    and no text."""
    name = re.sub(r"[^\w.-]", "-", f"{kind}-{facts['name']}")[:100]
    artifact = wandb.Artifact(name, type=kind, metadata=dict(facts))
    path = Path(run.settings.sync_dir, f"{kind}.json")
    try_to_write_json(path, facts)
    # Equal facts are the same version.
    artifact.add_file(str(path), policy="immutable", skip_cache=True)
    if run.offline:
        run.log_artifact(artifact)  # an output: only a server can record what a run uses
        return
    errors: list[Exception] = []

    def use() -> None:
        try:
            run.use_artifact(artifact)
        except Exception as error:
            errors.append(error)

    using = threading.Thread(target=use, daemon=True)
    using.start()
    using.join(INIT_TIMEOUT_S)  # W&B itself waits without a limit
    if errors:
        raise errors[0]


def _log_checkpoint(run: Any, checkpoint: Path, score: Mapping[str, float]) -> None:
    """Log an artifact of type model with the alias `best`.

    Online, wait for its upload; offline, `wandb sync` will read the files where they are.
    """
    metadata = {"step": read_manifest(checkpoint)["step"], **score}
    artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=metadata)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for path in files:  # immutable, so that W&B makes no copy
        artifact.add_file(
            str(path), str(path.relative_to(checkpoint)), policy="immutable", skip_cache=True
        )
    logged = run.log_artifact(artifact, aliases=["best"])
    if not run.offline:
        size = sum(path.stat().st_size for path in files)
        logged.wait(timeout=int(FINISH_TIMEOUT_S + size / UPLOAD_BYTES_PER_S))
