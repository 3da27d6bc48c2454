"""Reads a run back: which checkpoint, the configuration of its weights, and what may change when it is resumed.

    config.yaml                 how the run began; it never changes
    config-from-20.yaml         how it was resumed from step 20

Every checkpoint holds the configuration with which it was written, so no edited file can misdescribe its weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from scmoe.config.fields import Config, ConfigError, flatten, show
from scmoe.config.load import load, load_text
from scmoe.parallel.checkpoint.durable import newest_good, read_manifest
from scmoe.parallel.checkpoint.loading import read_meta

Which = Literal["last", "best"]
# Everything else makes another model or another experiment.
MAY_CHANGE = (
    *("trainer.", "strategy.", "schedule.", "offload.", "analysis.", "logger."),
    *("data.path", "data.workers", "data.cache_dir"),  # the data module checks that the content is the same
)


def find_checkpoint(run_dir: Path, which: Which = "last") -> Path:
    """Return the run's checkpoint of the latest step, or the one with the best validation. ConfigError: it has none."""
    try:
        return newest_good(run_dir / "checkpoints", "best-" if which == "best" else "")
    except FileNotFoundError as error:
        raise ConfigError(f"{run_dir} has no whole {which} checkpoint, allowed: a run that has saved one") from error


def config_of(run_dir: Path, checkpoint: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration with which a checkpoint was written; one of an older version has its run's only."""
    text = read_meta(checkpoint).get("config")
    if text is None:
        return load(run_dir / "config.yaml", overrides)
    return load_text(text, str(checkpoint), overrides)


def resumed_config(run_dir: Path, overrides: Sequence[str]) -> Config:
    """Return the configuration of a run that goes on from its last checkpoint. Nothing is written.

    Raises ConfigError for a run without a checkpoint, for a setting that would make another model or experiment, and
    for fewer steps than are done.
    """
    checkpoint = find_checkpoint(run_dir)
    step, was = read_manifest(checkpoint)["step"], config_of(run_dir, checkpoint)
    earlier = record_of(run_dir, step)  # the run was resumed from here before, and saved no later checkpoint
    config = load(earlier, overrides) if earlier.exists() else config_of(run_dir, checkpoint, overrides)
    refuse_other_model(config, was, checkpoint)
    if config.trainer.max_steps < step:
        done = f"allowed: {step} or more, as the run has done {step} steps"
        raise ConfigError(f"trainer.max_steps is {config.trainer.max_steps}, {done}")
    return config


def refuse_other_model(config: Config, was: Config, checkpoint: Path) -> None:
    """Raise ConfigError for the first key that makes another model or experiment than the checkpoint's."""
    here, there = flatten(config), flatten(was)
    for key, value in there.items():
        if here[key] != value and not key.startswith(MAY_CHANGE):
            raise ConfigError(f"{key} is {show(here[key])}, allowed: {show(value)}, as in {checkpoint}")


def record_of(run_dir: Path, step: int) -> Path:
    """Return where the configuration of a resumption from this step is kept."""
    return run_dir / f"config-from-{step}.yaml"


def summary_if_done(run_dir: Path, config: Config) -> dict[str, Any] | None:
    """Return the summary of a run that has done all its steps; None where steps or the summary are missing."""
    path = run_dir / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if summary.get("steps") != config.trainer.max_steps:
        return None  # most resumed runs: their checkpoint is not read once more
    step = read_manifest(find_checkpoint(run_dir))["step"]
    return summary if step >= config.trainer.max_steps else None
