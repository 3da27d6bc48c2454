"""What a run leaves behind: its directory, the rows of its loggers, and what it prints.

`open_output` opens all three on rank 0, and closes them however the run ends. At the start a run
prints its config and its model; at the end its summary, samples of its text, and the commands that
can follow.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import Logger
from rich.table import Table

from scmoe.config.as_yaml import changes_to_yaml, to_yaml
from scmoe.config.derived import last_step, max_steps, word_for_steps
from scmoe.config.fields import Config
from scmoe.config.installation import scmoe
from scmoe.config.leaves import ConfigError
from scmoe.config.registry import words
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.files import redacted, relative, try_to_write_json
from scmoe.lightning.seam.saves import Patience
from scmoe.models.model_cost import count_parameters, total_and_active
from scmoe.parallel.checkpoint.durable import UNREAD, BrokenCheckpoint, checkpoints, read_manifest
from scmoe.report import console, say
from scmoe.training.run.directory import create_run_dir, kept_state, refuse_running, write_config
from scmoe.training.run.loggers import (
    build_loggers,
    close_loggers,
    describe,
    log_inputs,
    log_results,
)
from scmoe.training.run.machine import is_rank_zero
from scmoe.training.run.resume import (
    Resumed,
    find_checkpoint,
    record_path,
    set_aside,
    set_aside_later,
    validates_again,
)
from scmoe.training.run.summary import summary_panel


@dataclass(frozen=True)
class RunOutput:
    """The directory, the loggers and the console of a run. On ranks other than 0 there are none,
    and nothing is written.

    config: of the run. public: the same without keys and passwords, for files, loggers and the
    console. quiet: nothing is printed.
    """

    config: Config
    public: Config
    quiet: bool = False
    directory: Path | None = None
    loggers: Sequence[Logger] = ()

    def log_inputs(self, data: PositionedDataModule) -> None:
        """Log what the run reads. data: prepared, on rank 0."""
        if self.directory is not None:
            log_inputs(self.loggers, self.public, data.state_dict())

    def keep_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the summary into the directory. Return it with the directory's path."""
        if self.directory is None:
            return summary
        summary = {"run_dir": str(relative(self.directory)), **summary}
        try_to_write_json(self.directory / "summary.json", summary)
        return summary

    def log_results(self, trainer: Trainer, summary: Mapping[str, Any], samples: list[str]) -> None:
        """Log what the run has at its end. samples: texts of its model."""
        if self.directory is None:
            return
        load = self.directory / "analysis" / "expert_load.png"
        saved = trainer.checkpoint_callbacks
        log_results(self.loggers, trainer.global_step, samples, load, summary, saved)

    def print_summary(self, trainer: Any, summary: Mapping[str, Any], samples: list[str]) -> None:
        """Print the summary's panel, what has ended the run before its last step, and the commands
        that can follow, ready to copy."""
        if self.directory is None or self.quiet:
            return
        run = relative(self.directory)
        out = console()
        out.print(summary_panel(summary, samples))
        steps = summary["steps"]
        last = last_step(self.config)
        limit = limit_reached(trainer, self.config) if steps < last else None
        if limit is not None:
            ended = f"{limit} has ended the run at step {steps} of {last}"
            out.print(ended, soft_wrap=True, markup=False)
        commands = {}
        if not self.config.trainer.fast_dev_run:  # such a run cannot go on
            commands["resume"] = resume_command(self.directory, steps, self.config, limit)
        if samples:
            commands["generate"] = scmoe("generate", run, *words(self.config.extensions, {}))
        if sync := sync_command(run):
            commands["sync to W&B"] = f"{relative(Path(sys.executable).parent)}/{sync}"
        for purpose, command in commands.items():
            out.print(f"{purpose:12} {command}", soft_wrap=True, markup=False)


@contextmanager
def open_output(
    config: Config,
    model: Any,
    overrides: Sequence[str] = (),
    resumed: Resumed | None = None,
    quiet: bool = False,
) -> Iterator[RunOutput]:
    """Open the output of a run and print what it will do, unless quiet; on exit, close its loggers
    and write its last state.

    model: the whole network, on the meta device. resumed: the run to continue, whose config.yaml
    stays as the run began; None creates a directory. A damaged checkpoint that it begins from is
    set aside.
    """
    public = redacted(config)
    if not is_rank_zero():
        yield RunOutput(config, public)
        return
    text = to_yaml(public)
    step = None
    if resumed is None:
        run_dir = create_run_dir(Path(config.runs_dir), config.name, overrides, text)
    else:
        run_dir = resumed.run_dir
        refuse_other_part(resumed)
        step = read_manifest(resumed.checkpoint)["step"]
        write_config(record_path(run_dir, step), text)

    with kept_state(run_dir):
        loggers: list[Logger] = []
        status = "failed"
        try:
            if not quiet:
                print_start(public, model, run_dir, resumed and resumed.checkpoint)
            again = resumed is not None and validates_again(resumed.checkpoint, config)
            loggers += build_loggers(public, run_dir, step, validates_again=again)
            if not quiet:
                console().print(f"metrics go to {listed([*map(describe, loggers)])}")
            if resumed is not None and resumed.step is not None:
                set_aside_later(run_dir, resumed.step)
            yield RunOutput(config, public, quiet, run_dir, loggers)
            status = "success"
        except SystemExit:
            say(f"stopped; {how_to_continue(run_dir, config)}")
            raise
        except Exception as error:
            if isinstance(error, BrokenCheckpoint) and resumed is not None:
                # its content; names and sizes were verified before
                set_aside(run_dir, [resumed.checkpoint])
                error.add_note(
                    "The damaged checkpoint is set aside. Resume again to go on from the one before"
                    " it."
                )
            error.add_note(how_to_continue(run_dir, config))
            raise
        finally:
            close_loggers(loggers, status)


def refuse_other_part(resumed: Resumed) -> None:
    """Raise ConfigError if another process trains the run, or has trained it further, since the
    checkpoint of this resumption was found: preparing data may take long."""
    run_dir = resumed.run_dir
    refuse_running(run_dir)
    if resumed.step is None and find_checkpoint(run_dir, share=UNREAD) != resumed.checkpoint:
        raise ConfigError(
            f"{relative(run_dir)} has gone on since this command began. Give the command again."
        )


# ---------------------------------------------------------------------- what is printed


def print_start(config: Config, model: Any, run_dir: Path, checkpoint: Path | None) -> None:
    """Print what differs from the default configuration, the model, and the checkpoint that a
    resumed run continues from. config: without keys and passwords."""
    out = console()
    run = relative(run_dir)
    title = f"config of {run}, where it is not the default; {run}/config.yaml has all of it:"
    out.print(title, changes_to_yaml(config), sep="\n", soft_wrap=True, markup=False)
    out.print(model_table(count_parameters(model)))
    if checkpoint is not None:
        out.print(f"continuing from {relative(checkpoint)}", soft_wrap=True, markup=False)


def model_table(counts: Mapping[str, tuple[int, int, int]]) -> Table:
    """Return what `count_parameters` has counted as a table."""
    table = Table("part", title="model", title_justify="left", title_style="bold", show_footer=True)
    total, active = total_and_active(counts)
    table.columns[0].footer = "all"
    table.add_column("modules", justify="right")
    table.add_column("parameters", justify="right", footer=f"{total:,}")
    table.add_column("active per token", justify="right", footer=f"{active:,}")
    for kind, (modules, size, used) in counts.items():
        table.add_row(kind, str(modules), f"{size:,}", f"{used:,}")
    return table


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them: "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def say_done(run_dir: Path, summary: dict[str, Any], config: Config) -> dict[str, Any]:
    """Print that a run has done all its steps, and return its summary."""
    more = resume_command(run_dir, summary["steps"], config)
    say(f"nothing to do: all {summary['steps']} steps are done; for more: {more}")
    return summary


def how_to_continue(run_dir: Path, config: Config) -> str:
    """Return the command that resumes a run, or that there is nothing to resume."""
    command = scmoe("resume", relative(run_dir), *own_classes(config))
    saved = checkpoints(run_dir / "checkpoints")
    return f"to continue: {command}" if saved else "no checkpoint was saved. Start the run again"


def limit_reached(trainer: Any, config: Config) -> str | None:
    """Return the key of the limit that has ended a training before its last step; None: a user's
    callback has ended it."""
    seconds_left = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]
    if "max_time" in config.trainer.extra and any(s is not None and s <= 0 for s in seconds_left):
        return "trainer.extra.max_time"
    reasons = [c.stopping_reason for c in trainer.callbacks if isinstance(c, Patience)]
    if any(reason != EarlyStoppingReason.NOT_STOPPED for reason in reasons):
        return "trainer.early_stopping"
    return None


def resume_command(run_dir: Path, steps: int, config: Config, limit: str | None = None) -> str:
    """Return the command that trains further. A run that ended before its last step keeps its
    number of steps. limit: what ended it there; it would end it again."""
    trainer = config.trainer
    done = steps >= max_steps(config)
    more = [word_for_steps(config, 2 * steps)] if done else []
    if trainer.limit_train_batches is not None:
        more.append("trainer.limit_train_batches=null")
    if limit is not None:
        more.append(f"{limit}=null")
    return scmoe("resume", relative(run_dir), *more, *own_classes(config))


def own_classes(config: Config) -> list[str]:
    """Return the words of a command that name the run's extensions and callbacks."""
    return words(config.extensions, config.callbacks)


def sync_command(run_dir: Path) -> str | None:
    """Return the command that uploads an offline run to W&B; None where there is none."""
    offline = sorted((run_dir / "wandb").glob("offline-run-*"))
    return shlex.join(["wandb", "sync", *map(str, offline)]) if offline else None
