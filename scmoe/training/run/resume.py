"""Reads a run back: its checkpoint, the configuration of its weights, what a resumption may change,
and what a resumed run sets aside.

    config.yaml                 how the run began; it never changes
    config-from-20.yaml         how it was resumed from step 20

Every checkpoint holds the configuration with which it was written, so an edited file cannot give
its weights other settings.
"""

import re
import uuid
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scmoe.config.derived import last_step, max_steps, word_for_steps
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, flatten, show
from scmoe.config.load import load_text, parse_yaml, read_text
from scmoe.config.registry import named, words
from scmoe.config.untyped import guessed
from scmoe.files import read_json, relative
from scmoe.lightning.seam.loops import validation_is_left
from scmoe.parallel.checkpoint.durable import (
    UNREAD,
    BrokenCheckpoint,
    checkpoints,
    newest_good,
    read_manifest,
    verify,
)
from scmoe.parallel.checkpoint.loading import read_meta
from scmoe.report import say
from scmoe.training.assembly.data import kept_tokenizer
from scmoe.training.run.directory import why_no_checkpoint

STEP_OVERRIDE = re.compile(r"(--)?step=")
Which = Literal["last", "best"]
# Everything else makes another model or another experiment.
MAY_CHANGE = (
    "trainer.",
    "strategy.",
    "schedule.",
    "offload.",
    "analysis.",
    "logger.",
    "data.path",  # the data module checks the content
    "data.tokenizer",
    "data.workers",
    "data.cache_dir",
    "extensions",
    "callbacks",
)
# A resumed training keeps these: they decide which samples come next, and Lightning counts its
# progress in batches.
MUST_STAY = ("trainer.overfit_batches", "trainer.accumulate")


class Resumed(NamedTuple):
    """A run that goes on. step: the one that the user named; later ones are set aside. None: the
    newest."""

    run_dir: Path
    checkpoint: Path
    step: int | None


def find_checkpoint(run_dir: Path, which: Which = "last", share: slice = slice(None)) -> Path:
    """Return the run's checkpoint of the latest step, or the one with the best validation.

    share: which of its files are read, as in `verify`; of others only the size is compared.
    ConfigError: the run has no such checkpoint.
    """
    folder = run_dir / "checkpoints"
    try:
        newest = newest_good(folder, share=share)
        return best_checkpoint(newest, folder, share) if which == "best" else newest
    except FileNotFoundError as error:
        raise ConfigError(why_no_checkpoint(run_dir, which)) from error


def best_checkpoint(newest: Path, folder: Path, share: slice = slice(None)) -> Path:
    """Return the whole checkpoint with the best validation. The newest one knows the scores of all
    that are kept.

    share: as in `verify`. FileNotFoundError: there is none.
    """
    scores: dict[str, float] = {}
    for name, state in read_meta(newest).get("callbacks", {}).items():
        if name.startswith("ModelCheckpoint") and state.get("monitor"):
            sign = 1 if "'mode': 'max'" in name else -1
            scores = {
                Path(path).name: sign * float(score)
                for path, score in state["best_k_models"].items()
            }
    for name in sorted(scores, key=scores.__getitem__, reverse=True):
        try:
            verify(folder / name, share)
        except BrokenCheckpoint as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
        else:
            return folder / name
    return newest_good(folder, "best-", share)


def verified_checkpoint(run_dir: Path, step: int) -> Path:
    """Return the checkpoint of this step, after its names and sizes are verified. ConfigError:
    there is none, or it is damaged."""
    folder = run_dir / "checkpoints"
    steps = set[int]()
    for path in checkpoints(folder):
        with suppress(BrokenCheckpoint):
            steps.add(read_manifest(path)["step"])
    if step not in steps:
        kept = ", ".join(map(str, sorted(steps)))
        raise ConfigError(
            f"step is {step}, allowed: {kept}, whose checkpoints are kept; trainer.save_top_k keeps"
            " more of them"
        )
    try:
        return newest_good(folder, share=UNREAD, step=step)
    except FileNotFoundError as error:
        raise ConfigError(
            f"The checkpoint of step {step} is damaged, as said above. Give another step."
        ) from error


def split_step(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """Split `step=N` from the overrides of a resumption; None without it. ConfigError: N is no
    number of steps."""
    others = [word for word in words if not STEP_OVERRIDE.match(word)]
    steps = [
        word.removeprefix("--").removeprefix("step=") for word in words if STEP_OVERRIDE.match(word)
    ]
    if not steps:
        return None, others
    if not steps[-1].isdecimal():
        raise ConfigError(f"command line: step is {show(steps[-1])}. Give a number of steps.")
    return int(steps[-1]), others


def checkpoint_config(
    checkpoint: Path, overrides: Sequence[str] = (), trains: bool = True
) -> Config:
    """Return the configuration with which a checkpoint was written, without its callbacks. trains:
    as `validate` takes it."""
    return load_text(config_text(checkpoint), str(checkpoint), overrides, trains)


def config_text(checkpoint: Path) -> str:
    """Return the configuration in a checkpoint, as text. ConfigError: it has none."""
    text = read_meta(checkpoint).get("config")
    if text is None:
        raise ConfigError(
            f"{checkpoint} holds no configuration: it is not of `scmoe train`. Load it into the"
            " module that it is of."
        )
    return text


def resumption(
    run_dir: Path, overrides: Sequence[str], step: int | None = None
) -> tuple[Config, Resumed]:
    """Return the configuration of a run that goes on from its last checkpoint, or from that of a
    step.

    Nothing is written. Only names and sizes of the checkpoint's files are verified: every rank does
    this, and reads its share of them later. ConfigError: there is no such checkpoint, a setting
    would make another model or experiment, or fewer steps are asked for than are done.
    """
    checkpoint = (
        find_checkpoint(run_dir, share=UNREAD)
        if step is None
        else verified_checkpoint(run_dir, step)
    )
    done = read_manifest(checkpoint)["step"]
    was = checkpoint_config(checkpoint, named(overrides))
    earlier = record_path(run_dir, done)
    if earlier.exists():  # the run was resumed from here before, and saved no later checkpoint
        text, source = read_text(earlier), str(earlier)
    else:
        text, source = config_text(checkpoint), str(checkpoint)

    config = load_text(text, source, overrides)
    refuse_kept_callbacks(text, source, overrides)
    refuse_other_model(config, was, checkpoint, MUST_STAY)
    if config.trainer.fast_dev_run:
        raise ConfigError("trainer.fast_dev_run is true, but a run that goes on is no short trial.")
    steps = max_steps(config)
    if steps < done:
        length = word_for_steps(config, steps).replace("=", " is ")
        least = word_for_steps(config, done).partition("=")[2]
        raise ConfigError(f"{length}, but the run has done {done} steps. Give {least} or more.")
    if last_step(config) < done:
        limit = config.trainer.limit_train_batches
        least = done * config.trainer.accumulate
        raise ConfigError(
            f"trainer.limit_train_batches is {limit}, but the run has done {done} steps. Give"
            f" {least} or more, or null."
        )
    return config, Resumed(run_dir, checkpoint, step)


def refuse_kept_callbacks(text: str, source: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError if the run had callbacks and the command names none: a kept configuration
    runs no code."""
    kept = parse_yaml(text, source).get("callbacks")
    if kept and not named(overrides, "callbacks"):
        again = " ".join(words((), guessed(kept)))
        raise ConfigError(
            f"{source}: callbacks is {show(kept)}, but the configuration in a run runs no callback;"
            f" add {again} to the command, or callbacks={{}} to go on without"
        )


def refuse_other_model(
    config: Config, was: Config, checkpoint: Path, must_stay: Sequence[str] = ()
) -> None:
    """Raise ConfigError for the first key that makes another model or experiment than the
    checkpoint's."""
    here = flatten(config)
    there = flatten(was)
    key = "data.tokenizer"
    if here[key] != there[key] and kept_tokenizer(checkpoint) is None:
        # no tokenizer is kept with which another one could be compared
        must_stay = (*must_stay, key)
    for key, value in there.items():
        if here[key] != value and (key in must_stay or not key.startswith(MAY_CHANGE)):
            raise ConfigError(
                f"{key} is {show(here[key])}, allowed: {show(value)}, as in {checkpoint}"
            )


def validates_again(checkpoint: Path, config: Config) -> bool:
    """Return whether a run first does the validation of the step that it goes on from. config: of
    the resumption, which may validate after other steps."""
    trainer = config.trainer
    is_due = read_manifest(checkpoint)["step"] % trainer.val_every == 0
    return is_due and trainer.limit_val_batches != 0 and validation_is_left(read_meta(checkpoint))


def set_aside_later(run_dir: Path, step: int) -> None:
    """Move checkpoints, configurations and the summary after this step to set-aside/ of the run.

    These steps are done again. Otherwise the next resumption would take one of them as the newest.
    """
    later = list[Path]()
    for path in run_dir.glob("config-from-*.yaml"):
        resumed_from = path.stem.rpartition("-")[2]
        if resumed_from.isdecimal() and int(resumed_from) > step:  # others are the user's own
            later.append(path)
    summary = run_dir / "summary.json"
    if read_json(summary).get("steps", 0) > step:
        later.append(summary)
    for path in checkpoints(run_dir / "checkpoints"):
        with suppress(BrokenCheckpoint):
            if read_manifest(path)["step"] > step:
                later.append(path)
    set_aside(run_dir, later)


def set_aside(run_dir: Path, paths: Sequence[Path]) -> None:
    """Move files or checkpoints to set-aside/ of the run."""
    for path in paths:
        aside = run_dir / "set-aside" / f"{path.name}-{uuid.uuid4().hex[:8]}"
        aside.parent.mkdir(exist_ok=True)
        path.rename(aside)
        say(f"set aside: {relative(path)} is now {relative(aside)}")


def record_path(run_dir: Path, step: int) -> Path:
    """Return where the configuration of a resumption from this step is kept."""
    return run_dir / f"config-from-{step}.yaml"


def summary_if_done(run: Resumed, last_step: int) -> dict[str, Any] | None:
    """Return the summary of a run that has done all its steps; None where steps or the summary are
    missing."""
    summary = read_json(run.run_dir / "summary.json")
    is_done = summary.get("steps") == last_step <= read_manifest(run.checkpoint)["step"]
    return summary if is_done and run.step is None else None
