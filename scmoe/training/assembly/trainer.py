"""Builds the Trainer of a configuration, with its strategy and callbacks."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from scmoe.config.derived import last_step, max_steps, resolve_ep_size, word_for_steps
from scmoe.config.fields import Config
from scmoe.config.halved_batches import possible_batches
from scmoe.config.leaves import ConfigError, show
from scmoe.config.registry import CALLBACKS, IMAGES
from scmoe.lightning.seam.progress_bar import StepProgressBar
from scmoe.lightning.seam.saves import BestCheckpoints, LastCheckpoint, Patience
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.training.assembly.rank_job import cpu_threads
from scmoe.training.callbacks.adaptive_schedule import AdaptiveSchedule
from scmoe.training.callbacks.data_position import DataPosition
from scmoe.training.callbacks.expert_load import ExpertLoad
from scmoe.training.callbacks.gradient_norms import GradientNorms
from scmoe.training.callbacks.log_lines import LogLines
from scmoe.training.callbacks.peak_memory import PeakMemory
from scmoe.training.callbacks.skipped_images import SkippedImages
from scmoe.training.callbacks.step_times import StepTimes
from scmoe.training.callbacks.throughput import Throughput

register_callback = CALLBACKS.register


def seed_everything(seed: int) -> None:
    """Seed the global generators equally on all ranks. The strategy lets them differ inside
    training steps."""
    lightning.pytorch.seed_everything(seed, verbose=False)


def build_callbacks(config: Config, run_dir: Path | None) -> list[Callback]:
    """Return the callbacks of a training, except for KeptConfig.

    run_dir: on rank 0; None on other ranks, where ModelCheckpoint gets its folder from rank 0.
    """
    data = config.data
    trainer = config.trainer
    checkpoints = run_dir / "checkpoints" if run_dir else None
    analysis = run_dir / "analysis" if run_dir else None
    images = data.name in IMAGES
    micro_batch = data.global_batch_size // trainer.accumulate
    best, mode = ("val/accuracy", "max") if images else ("val/bits_per_byte", "min")

    callbacks: list[Callback] = [
        DataPosition(),
        ExpertLoad(analysis if config.analysis.expert_load else None),
        Throughput(micro_batch, None if images else data.seq_len, trainer.peak_tflops),
        StepTimes(),
        GradientNorms(),
        PeakMemory(),
    ]
    if trainer.limit_val_batches != 0 and trainer.save_top_k:
        callbacks.append(BestCheckpoints(checkpoints, best, mode, trainer.save_top_k))
    if trainer.early_stopping is not None:
        patience = trainer.early_stopping
        callbacks.append(
            Patience(best, patience=patience, mode=mode, check_on_train_epoch_end=False)
        )
    if trainer.profile_steps is not None:
        from scmoe.training.callbacks.profile_steps import ProfileSteps

        callbacks.append(ProfileSteps(trainer.profile_steps, run_dir))
    batches = possible_batches(config)
    always_two = batches == (2,)  # then operators overlap
    if config.moe.architecture not in ("dense", "dgmoe_share") and not always_two:
        callbacks.append(adaptive_schedule(config, run_dir, batches))
    if images and data.on_error == "skip":
        callbacks.append(SkippedImages())
    callbacks += measurements(config, analysis)
    if trainer.progress:
        callbacks.append(StepProgressBar() if sys.stderr.isatty() else LogLines())
    callbacks += [CALLBACKS[name](**options) for name, options in config.callbacks.items()]
    return [*callbacks, LastCheckpoint(checkpoints, trainer.checkpoint_every)]


def measurements(config: Config, folder: Path | None) -> Iterator[Callback]:
    """Yield the callbacks of Fig. 9, Fig. 10, Eq. 22 and recorded routings, which few trainings
    have.

    folder: where rank 0 writes.
    """
    measured = config.analysis
    if measured.gating_every is not None:
        from scmoe.training.callbacks.analysis import Analysis, gating

        yield Analysis(gating(config.moe.position), measured.gating_every, folder)
    if measured.similarity_every is not None:
        from scmoe.training.callbacks.analysis import SIMILARITY, Analysis

        yield Analysis(SIMILARITY, measured.similarity_every, folder)
    if measured.gradients_every is not None:
        from scmoe.training.callbacks.analysis import GRADIENTS, Analysis

        yield Analysis(GRADIENTS, measured.gradients_every, folder)
    if measured.record_routing is not None:
        from scmoe.training.callbacks.record_routing import RecordRouting

        yield RecordRouting(measured.record_routing, folder)


def adaptive_schedule(
    config: Config, run_dir: Path | None, batches: tuple[int, ...]
) -> AdaptiveSchedule:
    """Return the callback of the schedule, which chooses it where schedule.auto is set. batches:
    the numbers in flight that are possible."""
    schedule = config.schedule
    chunks = (1, 2, 4) if schedule.chunks is None else (schedule.chunks,)
    plan = run_dir / "plan.json" if run_dir else None
    conditions = timing_conditions(config)
    length_key = word_for_steps(config, 1).partition("=")[0]
    if last_step(config) < max_steps(config):
        length_key = "trainer.limit_train_batches"
    return AdaptiveSchedule(schedule.auto, chunks, plan, conditions, batches, length_key)


def timing_conditions(config: Config) -> dict[str, Any]:
    """Return the settings that change how long operators take: a plan is valid for these only."""
    trainer = config.trainer
    strategy = config.strategy
    return {
        "num_nodes": trainer.num_nodes,
        "precision": trainer.precision,
        "threads": trainer.threads,
        "compile": trainer.compile,
        "recompute": trainer.recompute,
        "wire_dtype": strategy.wire_dtype,
        "dense": strategy.dense,
    }


def build_strategy(
    config: Config, dense_estimates: Mapping[str, float] | None = None
) -> ExpertParallelStrategy:
    """Return the Strategy. dense_estimates: for strategy.dense=auto, as it takes them."""
    strategy = config.strategy
    return ExpertParallelStrategy(
        resolve_ep_size(config),
        strategy.timeout_s,
        async_checkpoint=strategy.async_checkpoint,
        dense=strategy.dense,
        dense_estimates=dense_estimates,
    )


def build_trainer(
    config: Config,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    dense_estimates: Mapping[str, float] | None = None,
) -> Trainer:
    """Return the Trainer with its Strategy. dense_estimates: as `build_strategy` takes them.
    ConfigError: Lightning's Trainer does not take trainer.extra."""
    trainer = config.trainer
    threads = cpu_threads(config)
    # Lightning's launcher sets the number too, before `setup`.
    set_threads = LambdaCallback(setup=lambda *_, **__: torch.set_num_threads(threads))
    try:
        return Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=build_strategy(config, dense_estimates),
            precision=trainer.precision,
            max_steps=last_step(config),
            max_epochs=-1,
            accumulate_grad_batches=trainer.accumulate,
            val_check_interval=trainer.val_every * trainer.accumulate,
            check_val_every_n_epoch=None,
            limit_val_batches=trainer.limit_val_batches,
            num_sanity_val_steps=0,
            log_every_n_steps=trainer.log_every,
            deterministic=trainer.deterministic,
            use_distributed_sampler=False,
            enable_progress_bar=trainer.progress and sys.stderr.isatty(),
            enable_model_summary=False,
            callbacks=[*callbacks, set_threads],
            logger=list(loggers),
            **trainer.extra,
        )
    except (
        AttributeError,
        RuntimeError,
        TypeError,
        ValueError,
        MisconfigurationException,
    ) as error:
        if not trainer.extra:
            raise
        raise ConfigError(
            f"Lightning's Trainer does not take trainer.extra {show(trainer.extra)}: {error}"
        ) from error
