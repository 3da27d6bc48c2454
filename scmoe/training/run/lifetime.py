"""A run from its directory to its last state: opened before training, closed and marked however training ends."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import Logger

from scmoe.config.extras import scmoe
from scmoe.config.fields import Config
from scmoe.config.load import to_yaml
from scmoe.config.registry import words
from scmoe.parallel.checkpoint.durable import checkpoints, read_manifest
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.redact import redacted
from scmoe.training.run.directory import create_run_dir, relative, write_config
from scmoe.training.run.loggers import build_loggers, close_loggers, describe
from scmoe.training.run.machine import is_rank_zero
from scmoe.training.run.printout import config_tree, console, count_parameters, model_table
from scmoe.training.run.resume import record_of
from scmoe.training.run.run_state import show_life, write_state


@contextmanager
def open_run(
    config: Config, overrides: Sequence[str], run_dir: Path | None, checkpoint: Path | None
) -> Iterator[tuple[Path | None, list[Logger]]]:
    """Open the run and print what it will do; on exit, close its loggers and write its last state.

    It yields the directory and the loggers; on ranks other than 0, None and none.
    run_dir: the run to continue from `checkpoint`; None creates a directory. config.yaml stays as the run began.
    The last state is `finished`, `cut` where the Strategy was asked to stop and has saved (SystemExit), else `failed`.
    """
    if not is_rank_zero():
        yield None, []
        return
    kept = redacted(config)
    if run_dir is None:
        run_dir = create_run_dir(Path(config.runs_dir), config.name, overrides, to_yaml(kept))
    else:
        assert checkpoint is not None
        write_config(record_of(run_dir, read_manifest(checkpoint)["step"]), to_yaml(kept))
    loggers: list[Logger] = []
    state = "failed"
    write_state(run_dir, "running")
    ended = show_life(run_dir)
    try:
        out = console()
        out.print(config_tree(kept, f"config of {relative(run_dir)}"))
        out.print(model_table(count_parameters(build_model_on_meta(config))))
        if checkpoint is not None:
            out.print(f"continuing from {relative(checkpoint)}", soft_wrap=True)
        resumed_step = read_manifest(checkpoint)["step"] if checkpoint else None
        loggers = build_loggers(config, run_dir, resumed_step)
        out.print(f"metrics go to {' and to '.join(map(describe, loggers))}")
        yield run_dir, loggers
        state = "finished"
    except SystemExit:
        state = "cut"
        print(f"stopped; {how_to_continue(config, run_dir)}", file=sys.stderr, flush=True)
        raise
    except Exception as error:
        error.add_note(how_to_continue(config, run_dir))
        raise
    finally:
        ended.set()
        try:
            close_loggers(loggers, "success" if state == "finished" else "failed")
        finally:
            write_state(run_dir, state)


def how_to_continue(config: Config, run_dir: Path) -> str:
    saved = checkpoints(run_dir / "checkpoints")
    command = scmoe("resume", relative(run_dir), *words(config.extensions, config.callbacks))
    return f"to continue: {command}" if saved else "no step was saved, start it again"
