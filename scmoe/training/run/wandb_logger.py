"""The logger of Weights & Biases, online or offline. Once training has started, it never ends a run (fault 32)."""

import json
import netrc
import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger

from scmoe.config.extras import require
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, show
from scmoe.parallel.checkpoint.durable import MANIFEST
from scmoe.training.files import redacted, warn_once, write_json

HAS_WANDB = find_spec("wandb") is not None
WANDB_TROUBLE: tuple[type[Exception], ...] = (OSError,)
if HAS_WANDB:
    import wandb

    WANDB_TROUBLE = (wandb.Error, OSError)  # the server refuses or does not answer, or W&B's own process is gone

DEFAULT_SERVER = "https://api.wandb.ai"
INIT_TIMEOUT_S = 20.0  # how long a server may take to answer
FINISH_TIMEOUT_S = 60.0  # how long the last uploads may take; the rest stays in the run directory
UPLOAD_BYTES_PER_S = 1e6  # the slowest upload of a checkpoint that is waited for
STEP = "trainer/global_step"
BEST = {"min": ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte"), "max": ("val/accuracy",)}


def has_wandb_key() -> bool:
    """Look where W&B does: in the environment, and in netrc under the server's name and port."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL") or DEFAULT_SERVER).netloc
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_mode(config: Config) -> str:
    """Return logger.mode; for `auto` WANDB_MODE, where it is set, and `disabled` where W&B is not installed.

    Raises ConfigError for wrong values of W&B's environment variables, and for another mode if W&B is not installed.
    """
    mode = os.environ.get("WANDB_MODE") or "auto"
    if mode not in (allowed := ("online", "offline", "disabled", "auto")):
        raise ConfigError(f"WANDB_MODE is {show(mode)}, allowed: {' | '.join(allowed[:3])}, or unset")
    url = os.environ.get("WANDB_BASE_URL")
    try:
        server = urlparse(url or DEFAULT_SERVER)
        whole = server.scheme in ("http", "https") and server.hostname and (server.port or True)
    except ValueError:  # brackets, or a port that is no number
        whole = False
    mode = mode if config.logger.mode == "auto" else config.logger.mode
    if not HAS_WANDB and mode == "auto":
        return "disabled"
    if mode != "disabled":
        require(f"logger.mode={mode}", "wandb")
    if not whole and mode != "disabled":
        raise ConfigError(f"WANDB_BASE_URL is {show(url)}, allowed: such as {DEFAULT_SERVER}, or unset")
    return mode


def wandb_project(config: Config) -> str:
    """Return logger.project, else WANDB_PROJECT, else scmoe."""
    return config.logger.project or os.environ.get("WANDB_PROJECT") or "scmoe"


def wandb_logger(run_dir: Path, config: Config) -> WandbLogger:
    """Return the logger of a W&B run, the same one when a training is resumed: its id is kept in the run directory.

    The mode `auto` is online if a key is found and the server answers, else offline. Raises ConfigError if W&B cannot
    start in another mode.
    """
    config = redacted(config)
    mode, project, logger = wandb_mode(config), wandb_project(config), config.logger
    # Without a key, W&B would ask for one, or raise.
    offline = mode == "offline" or (mode == "auto" and not has_wandb_key())
    resolved: Literal["online", "offline"] = "offline" if offline else "online"
    record = run_dir / "wandb_run.json"
    if record.exists():
        kept = json.loads(record.read_text())
        # the variables may have changed since, and a sweep decides the project and the entity of its trials
        run_id, project = kept["id"], logger.project or kept["project"]
        entity = logger.entity or kept.get("entity")
    else:
        run_id = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]  # a sweep's agent sets the id of its trial
        entity = logger.entity
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        x_disable_meta=redacted(sys.argv) != sys.argv,  # W&B's metadata hold the command line, keys too
    )
    wandb.setup(settings)  # silent from here on; the messages below are enough
    start = partial(  # where None stands, W&B takes its own variable: WANDB_ENTITY, WANDB_TAGS, ...
        wandb.init,
        entity=entity,
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
        reason = str(error).splitlines()[0]
        if mode != "auto" or offline:
            raise ConfigError(f"logger.mode is {resolved}, allowed here: offline | disabled: {reason}") from error
        print(f"warning: Weights & Biases goes offline: {reason}", file=sys.stderr, flush=True)
        wandb.teardown()  # otherwise its process would see the id as in use
        run = start(mode="offline")
    kept = {"id": run_id, "project": run.project or project, "entity": run.entity or None, "mode": resolved}
    write_json(record, kept)
    define_metrics(run)
    return SafeWandbLogger(experiment=run)


def define_metrics(run: Any) -> None:
    """Define the x axis of every chart, and which value of a metric stands for a run: the best of losses, else the
    last."""
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    for summary, names in BEST.items():
        for name in names:
            run.define_metric(name, step_metric=STEP, step_sync=True, summary=summary)


class SafeWandbLogger(WandbLogger):
    """Stops logging with one warning where Lightning's logger would end the training, as when W&B's process dies."""

    lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(lambda: super(SafeWandbLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        self._try(lambda: super(SafeWandbLogger, self).log_hyperparams(params))

    def log_at_the_end(self, key: str, value: Any, step: int) -> None:
        """Log a picture or a table."""
        self._try(lambda: self.experiment.log({key: value, STEP: step}), (Exception,))

    def log_input(self, kind: str, name: str, facts: Mapping[str, Any]) -> None:
        """Log an artifact that says which data set, or tokenizer, the run reads. It holds these facts and no text."""
        self._try(lambda: self._describe(kind, name, facts), (Exception,))

    def _describe(self, kind: str, name: str, facts: Mapping[str, Any]) -> None:
        allowed = re.sub(r"[^\w.-]", "-", f"{kind}-{name}")[:100]
        artifact = wandb.Artifact(allowed, type=kind, metadata=dict(facts))
        path = Path(self.experiment.settings.sync_dir, f"{kind}.json")
        write_json(path, facts)
        artifact.add_file(str(path), policy="immutable", skip_cache=True)  # equal facts are the same version
        self.experiment.log_artifact(artifact)

    def log_checkpoint(self, checkpoint: Path, metric: str, value: float) -> None:
        """Log an artifact of type model with the alias `best`.

        Online, wait for its upload; offline, `wandb sync` will read the files where they are.
        """
        self._try(lambda: self._upload(checkpoint, metric, value), (Exception,))  # the client raises errors of any kind

    def _upload(self, checkpoint: Path, metric: str, value: float) -> None:
        metadata = {"step": json.loads((checkpoint / MANIFEST).read_text())["step"], metric: value}
        artifact = wandb.Artifact(f"checkpoint-{self.experiment.id}", type="model", metadata=metadata)
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        for path in files:  # immutable, so that W&B makes no copy
            artifact.add_file(str(path), str(path.relative_to(checkpoint)), policy="immutable", skip_cache=True)
        logged = self.experiment.log_artifact(artifact, aliases=["best"])
        if not self.experiment.offline:
            size = sum(path.stat().st_size for path in files)
            logged.wait(timeout=int(FINISH_TIMEOUT_S + size / UPLOAD_BYTES_PER_S))

    def close(self, status: str) -> None:
        finish = partial(self.experiment.finish, exit_code=0 if status == "success" else 1)
        if self.lost:  # W&B's process may still run, and must not outlive this one
            with suppress(Exception):
                finish()
        else:
            self._try(finish, (Exception,))  # when its process dies, the client raises errors of other kinds

    def _try(self, action: Callable[[], None], trouble: tuple[type[Exception], ...] = WANDB_TROUBLE) -> None:
        if self.lost:
            return
        try:
            action()
        except trouble as error:
            self.lost = True
            reason, kept = f"{error} ".splitlines()[0].strip(" ."), Path(self.experiment.settings.sync_dir)
            # as a new run: the rows that have arrived would come twice
            again = f"wandb sync --include-online --id {uuid.uuid4().hex[:8]} {kept}"
            warn_once(f"Weights & Biases receives nothing more of this run: {reason}; to upload all of it: {again}")
