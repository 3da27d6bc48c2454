"""Starts ranks with the model of a run or of an export, for commands that do not train: evaluate,
generate."""

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from scmoe.config.derived import resolve_ep_size
from scmoe.config.fields import Config
from scmoe.config.halved_batches import SENDS_NO_ROWS, travel_overrides
from scmoe.config.leaves import ConfigError
from scmoe.config.load import keys_of, load_kept
from scmoe.config.registry import named
from scmoe.files import relative
from scmoe.parallel.checkpoint.durable import UNREAD, BrokenCheckpoint, MissingCheckpoint
from scmoe.parallel.checkpoint.export import EXPORT, load_weights
from scmoe.runs.trained import check_export
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import build_trainer
from scmoe.training.modules import MoEModule
from scmoe.training.run.machine import check_devices, check_resident
from scmoe.training.run.resume import Which, checkpoint_config, find_checkpoint, refuse_other_model
from scmoe.training.run.train import silence_lightning

# The defaults: one process, and one thread, because a product of one row differs in its last bits
# with the number of threads.
ONE_RANK = (
    *("trainer.devices=1", "trainer.num_nodes=1", "trainer.threads=1"),
    *("strategy.ep_size=null", "strategy.dense=replicated", "strategy.wire_dtype=null"),
    *SENDS_NO_ROWS,
)
# Turned off: what only helps training, and what would make results depend on the number of ranks.
WITHOUT = (
    *(
        "trainer.progress=false",
        "trainer.compile=false",
        "trainer.recompute=false",
        "schedule.auto=false",
    ),
    *("moe.dropless_ceiling=null", "moe.overflow=drop", "strategy.wire_dtype=null"),
)


def find_weights(run: Path, which: Which, overrides: Sequence[str]) -> tuple[Path, Config]:
    """Return a run's checkpoint, or the exported file itself, and the configuration with which it
    is used.

    The files of a checkpoint are not verified here, as every rank calls this. They are verified
    where they are loaded, by each rank a share. Raises ConfigError if there is no checkpoint, and
    as `config_without_training`.
    """
    if run.suffix != EXPORT:
        checkpoint = find_checkpoint(run, which, UNREAD)
        read = partial(checkpoint_config, checkpoint, trains=False)
        return checkpoint, config_without_training(read, checkpoint, overrides, "as trained")
    read = partial(load_kept, run.parent / "config.yaml", trains=False)
    config = config_without_training(read, run, overrides, "as trained")
    check_export(run, config)
    return run, config


def config_without_training(
    read: Callable[[Sequence[str]], Config],
    weights: Path,
    overrides: Sequence[str],
    rows_travel: Literal["as trained", "in one batch"] = "in one batch",
) -> Config:
    """Return the configuration with which a run's weights are used.

    read: returns the run's configuration with overrides, checked for what does not train.
    rows_travel: as trained: between ranks the run's batches in flight and transfers are kept,
    unless an override names one of them. Products of a part of a batch have other numbers of rows,
    so a result could differ in its last bits from that of one process. Raises ConfigError if an
    override would make another model, or if ranks or devices are missing.
    """
    of_training = read(named(overrides))
    refuse_other_model(read([*ONE_RANK, *overrides]), of_training, weights)
    # Filled: the counts of rows are announced, so that each rank may have another number of them.
    rows = f"moe.rows={'auto' if of_training.moe.architecture == 'dense' else 'filled'}"
    config = read([*ONE_RANK, *overrides, *WITHOUT, rows])
    is_asked = keys_of(overrides) & keys_of(SENDS_NO_ROWS)
    if rows_travel == "as trained" and resolve_ep_size(config) > 1 and not is_asked:
        config = read([*ONE_RANK, *travel_overrides(of_training), *overrides, *WITHOUT, rows])
    if config.strategy.dense != "replicated":  # FSDP does not run in inference mode
        raise ConfigError(
            f"strategy.dense is {config.strategy.dense!r}, which is for training only. Use"
            " strategy.dense=replicated."
        )
    check_devices(config)
    return config


def start_ranks(config: Config, weights: Path) -> tuple[MoEModule, Any]:
    """Start the ranks and read the weights. Return the module, in evaluation mode, and its Trainer.

    Every rank must call it. It builds and reads only its experts. Raises ValueError for a broken
    file, or another model's; ConfigError for a checkpoint that a training has replaced since it was
    found.
    """
    check_resident(config)
    silence_lightning()
    module = build_module(replace(config, init_from=None))
    trainer = build_trainer(config, [], [])
    exported = weights.suffix == EXPORT
    with warnings.catch_warnings():
        for message in (".*callbacks used to create the checkpoint.*", ".*across ranks is zero.*"):
            warnings.filterwarnings("ignore", message)
        # A validation without batches starts the ranks, and places and reads the model.
        checkpoint = None if exported else weights
        try:
            trainer.validate(module, [], checkpoint, verbose=False, weights_only=True)
        except (BrokenCheckpoint, OSError) as error:
            if isinstance(error, MissingCheckpoint) or not weights.exists():
                raise ConfigError(
                    f"{relative(weights)} is gone: a run that still trains replaces its"
                    " checkpoints. Give the command again."
                ) from error
            if isinstance(error, BrokenCheckpoint):
                error.add_note(
                    f"Move {relative(weights)} out of its folder. The checkpoint before it is then"
                    " used."
                )
            raise
    if exported:
        with ending_together(trainer):
            load_weights(weights, module.model)
    return module.to(trainer.strategy.root_device).eval(), trainer


@contextmanager
def ending_together(trainer: Any) -> Iterator[None]:
    """End all ranks if this one raises inside, and name one that does not answer, as in training.

    Ctrl-C ends in exit code 130, and in 0 on a rank that Lightning's launcher has started: on any
    other code the launcher would kill rank 0.
    """
    try:
        yield
    except BaseException as error:
        trainer.strategy.on_exception(error)
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(0 if trainer.strategy.is_launched else 128 + signal.SIGINT) from error
        raise
