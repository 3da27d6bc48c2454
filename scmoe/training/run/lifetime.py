"""A run from its directory to its last state: opened before training, closed and marked however training ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.loggers import Logger

from scmoe.config.fields import Config
from scmoe.config.load import to_yaml
from scmoe.parallel.checkpoint.durable import verify
from scmoe.parallel.lightning_seam import rank_without_trainer
from scmoe.training.build.model import build_model_on_meta
from scmoe.training.build.trainer import build_loggers
from scmoe.training.run.directory import create_run_dir, relative, write_config
from scmoe.training.run.loggers import close_loggers, describe
from scmoe.training.run.redact import without_keys
from scmoe.training.run.report import config_tree, console, count_parameters, model_table
from scmoe.training.run.state import write_state


@dataclass
class Run:
    """What rank 0 keeps of a run. On other ranks there is no directory and no logger."""

    directory: Path | None = None
    loggers: list[Logger] = field(default_factory=list)


@contextmanager
def open_run(config: Config, overrides: Sequence[str], run_dir: Path | None, checkpoint: Path | None) -> Iterator[Run]:
    """Open the run and print what it will do; on exit, close its loggers and write its last state.

    run_dir: the run to continue from `checkpoint`; None creates a directory.
    The last state is `finished`, `cut` where the Strategy was asked to stop and has saved (SystemExit), else `failed`.
    """
    if rank_without_trainer() != 0:
        yield Run()
        return
    kept = without_keys(config)
    if run_dir is None:
        run_dir = create_run_dir(Path(config.runs_dir), config.name, overrides, to_yaml(kept))
    else:
        write_config(run_dir, to_yaml(kept))
    run, state = Run(run_dir), "failed"
    write_state(run_dir, "running")
    try:
        out = console()
        out.print(config_tree(kept, f"config of {relative(run_dir)}"))
        out.print(model_table(count_parameters(build_model_on_meta(config))))
        if checkpoint is not None:
            out.print(f"continuing from {relative(checkpoint)}", soft_wrap=True)
        run.loggers += build_loggers(config, run_dir, resumed_step=verify(checkpoint) if checkpoint else None)
        out.print(f"metrics go to {' and to '.join(map(describe, run.loggers))}")
        yield run
        state = "finished"
    except SystemExit:
        state = "cut"
        print(f"stopped; to continue: make resume RUN={relative(run_dir)}", flush=True)
        raise
    finally:
        close_loggers(run.loggers, "success" if state == "finished" else "failed")
        write_state(run_dir, state)
