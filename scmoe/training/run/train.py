"""Runs one training, from its directory to its report. Every rank calls `train`.

What is trained comes in as `RunParts`, which assembly/start.py makes from a configuration.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from scmoe.config.as_yaml import to_yaml
from scmoe.files import relative, try_to_write_json
from scmoe.parallel.checkpoint.durable import BrokenCheckpoint, read_manifest
from scmoe.report import console
from scmoe.training.callbacks.kept_config import KeptConfig
from scmoe.training.run.directory import (
    create_run_dir,
    how_to_continue,
    refuse_running,
    show_life,
    write_config,
    write_state,
)
from scmoe.training.run.loggers import (
    build_loggers,
    close_loggers,
    describe,
    log_inputs,
    log_results,
)
from scmoe.training.run.machine import check_machine, is_rank_zero, keep_freed_memory
from scmoe.training.run.parts import RunParts
from scmoe.training.run.printout import listed, print_start, print_summary, say_done, summarise
from scmoe.training.run.resumed import (
    Resumed,
    record_path,
    set_aside,
    set_aside_later,
    summary_if_done,
)


def train(
    start: RunParts,
    overrides: Sequence[str] = (),
    resumed: Resumed | None = None,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Train and return the summary, which is also in the run directory; return None on ranks other
    than 0.

    start: the configuration and its parts. resumed: the run to continue; None starts a new run. A
    run that is done is not touched. quiet: print neither the config nor the summary, for example
    where the run directory is temporary.
    """
    config = start.config
    if resumed is not None:
        if (done := summary_if_done(resumed, start.last_step)) is not None:
            return say_done(resumed.run_dir, done, start) if is_rank_zero() else None
        if is_rank_zero():
            refuse_running(resumed.run_dir)

    silence_lightning()
    check_machine(start)
    keep_freed_memory()
    data = start.data()
    init_from = config.init_from if resumed is None else None  # a checkpoint has its own weights
    if is_rank_zero():
        start.prepare(init_from, data)

    with open_run(start, overrides, resumed, quiet) as (directory, loggers):
        if directory is not None:
            log_inputs(loggers, start.redacted, data.state_dict())
            if resumed is not None and resumed.step is not None:
                set_aside_later(directory, resumed.step)
        module = start.module(init_from)
        callbacks = [KeptConfig(start.redacted), *start.callbacks(directory)]
        trainer = start.trainer(callbacks, loggers)
        try:
            trainer.fit(module, data, ckpt_path=resumed and resumed.checkpoint, weights_only=True)
        except BrokenCheckpoint as error:  # its content; names and sizes were verified before
            if directory is not None and resumed is not None:
                set_aside(directory, [resumed.checkpoint])
                error.add_note(
                    "The damaged checkpoint is set aside. Resume again to go on from the one before"
                    " it."
                )
            raise

        summary = summarise(trainer, module, data)
        if directory is not None:
            summary = {"run_dir": str(relative(directory)), **summary}
            try_to_write_json(directory / "summary.json", summary)
        samples = start.samples(trainer, module, data)
        if directory is not None:
            load = directory / "analysis" / "expert_load.png"
            checkpoints = trainer.checkpoint_callbacks
            log_results(loggers, trainer.global_step, samples, load, summary, checkpoints)

    if directory is None or not trainer.is_global_zero:
        return None
    if not quiet:
        print_summary(directory, summary, samples, start)
    return summary


@contextmanager
def open_run(
    start: RunParts, overrides: Sequence[str], resumed: Resumed | None, quiet: bool = False
) -> Iterator[tuple[Path | None, list[Logger]]]:
    """Open the run and print what it will do, unless quiet; on exit, close its loggers and write
    its last state.

    Yields the directory and the loggers; on ranks other than 0, None and none. resumed: the run
    to continue, whose config.yaml stays as the run began; None creates a directory. The last state
    is `finished`, `cut` where the Strategy was asked to stop and has saved (SystemExit), else
    `failed`.
    """
    if not is_rank_zero():
        yield None, []
        return
    config = start.config
    text = to_yaml(start.redacted)
    step = None
    if resumed is None:
        run_dir = create_run_dir(Path(config.runs_dir), config.name, overrides, text)
    else:
        run_dir = resumed.run_dir
        step = read_manifest(resumed.checkpoint)["step"]
        write_config(record_path(run_dir, step), text)

    loggers: list[Logger] = []
    state = "failed"
    ended = show_life(run_dir)
    write_state(run_dir, "running")
    try:
        if not quiet:
            print_start(start, run_dir, resumed and resumed.checkpoint)
        loggers = build_loggers(start.redacted, run_dir, step)
        if not quiet:
            console().print(f"metrics go to {listed([*map(describe, loggers)])}")
        yield run_dir, loggers
        state = "finished"
    except SystemExit:
        state = "cut"
        print(
            f"stopped; {how_to_continue(run_dir, start.own_classes)}", file=sys.stderr, flush=True
        )
        raise
    except Exception as error:
        error.add_note(how_to_continue(run_dir, start.own_classes))
        raise
    finally:
        ended.set()
        try:
            close_loggers(loggers, "success" if state == "finished" else "failed")
        finally:
            write_state(run_dir, state)


def silence_lightning() -> None:
    """Silence the messages and warnings of Lightning that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        # Tokens come from a memory map: workers would only cost memory.
        ".*does not have many workers.*",
        # It is resumable: the sampler starts at the datamodule's position.
        ".*dataloader is not resumable.*",
        # These values are already equal on all ranks.
        ".*recommended to use `self.log.*sync_dist=True.*",
        # A deprecation in torch that only Lightning can fix.
        ".*isinstance.treespec, LeafSpec.*",
        # The directories of a resumed run.
        ".*is not empty.*",
        ".*number of.*batches.*logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
