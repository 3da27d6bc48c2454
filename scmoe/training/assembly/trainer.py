"""Builds the Trainer of a configuration, with its strategy and callbacks."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, show
from scmoe.config.registry import CALLBACKS, IMAGES
from scmoe.config.rules import last_step, may_run_two_batches, resolve_ep_size
from scmoe.footprint.memory import Job, rank_memory
from scmoe.lightning.seam import BestCheckpoints, LastCheckpoint, Patience, StepProgressBar
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel.dense import ways
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.callbacks.adaptive_schedule import AdaptiveSchedule
from scmoe.training.callbacks.analysis import (
    SIMILARITY,
    Analysis,
    ExpertLoad,
    RecordRouting,
    gating,
)
from scmoe.training.callbacks.progress import (
    DataPosition,
    GradientNorms,
    KeptConfig,
    LogLines,
    Memory,
    ProfileSteps,
    SkippedImages,
    StepTimes,
    Throughput,
)

register_callback = CALLBACKS.register


def seed_everything(config: Config) -> None:
    """Seed the global generators equally on all ranks. The strategy lets them differ inside
    training steps."""
    lightning.pytorch.seed_everything(config.seed, verbose=False)


def build_callbacks(config: Config, run_dir: Path | None) -> list[Callback]:
    """run_dir: on rank 0; None on other ranks, where ModelCheckpoint gets its folder from rank 0."""
    data, trainer, measured = config.data, config.trainer, config.analysis
    checkpoints, analysis = (
        run_dir / name if run_dir else None for name in ("checkpoints", "analysis")
    )
    images, micro_batch = data.name in IMAGES, data.global_batch_size // trainer.accumulate
    best, mode = ("val/accuracy", "max") if images else ("val/bits_per_byte", "min")
    chunks = (1, 2, 4) if config.schedule.chunks is None else (config.schedule.chunks,)
    plan = run_dir / "plan.json" if run_dir else None
    callbacks: list[Callback] = [
        DataPosition(),
        KeptConfig(config),
        ExpertLoad(analysis if measured.expert_load else None),
        Throughput(micro_batch, None if images else data.seq_len, trainer.peak_tflops),
        StepTimes(),
        GradientNorms(),
        Memory(),
        LastCheckpoint(checkpoints, trainer.checkpoint_every),
    ]
    if trainer.limit_val_batches != 0 and trainer.save_top_k:
        callbacks.append(BestCheckpoints(checkpoints, best, mode, trainer.save_top_k))
    if (patience := trainer.early_stopping) is not None:
        callbacks.append(
            Patience(best, patience=patience, mode=mode, check_on_train_epoch_end=False)
        )
    if trainer.profile_steps is not None:
        callbacks.append(ProfileSteps(trainer.profile_steps, run_dir))
    one_batch = config.schedule.batches_in_flight != 2  # of two, operators overlap each other
    in_flight = (1, 2) if config.schedule.auto and may_run_two_batches(config) else (1,)
    if config.moe.architecture not in ("dense", "dgmoe_share") and one_batch:
        callbacks.append(
            AdaptiveSchedule(
                config.schedule.auto, chunks, plan, timing_conditions(config), in_flight
            )
        )
    if images and data.on_error == "skip":
        callbacks.append(SkippedImages())
    if measured.gating_every is not None:
        callbacks.append(Analysis(gating(config.moe.position), measured.gating_every, analysis))
    if measured.similarity_every is not None:
        callbacks.append(Analysis(SIMILARITY, measured.similarity_every, analysis))
    if measured.record_routing is not None:
        callbacks.append(RecordRouting(measured.record_routing, analysis))
    if trainer.progress:
        callbacks.append(StepProgressBar() if sys.stderr.isatty() else LogLines())
    return callbacks + [CALLBACKS[name](**options) for name, options in config.callbacks.items()]


def timing_conditions(config: Config) -> dict[str, Any]:
    """Return the settings that change how long operators take: a plan is valid for these only."""
    trainer, strategy = config.trainer, config.strategy
    return {
        "num_nodes": trainer.num_nodes,
        "precision": trainer.precision,
        "threads": trainer.threads,
        "compile": trainer.compile,
        "recompute": trainer.recompute,
        "wire_dtype": strategy.wire_dtype,
        "exchange": strategy.exchange,
        "dense": strategy.dense,
        "reductions": strategy.reductions,
    }


def cpu_threads(config: Config) -> int:
    """Return the CPU threads of one rank."""
    usable = getattr(
        os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1)
    )  # macOS has no such function
    return config.trainer.threads or max(1, len(usable(0)) // config.trainer.devices)


def dense_estimates(config: Config) -> dict[str, float]:
    """Return for each way of keeping dense weights the bytes that a rank needs at most, activations
    included."""
    job, model = Job.of(config), build_model_on_meta(config)
    possible = ways(model, job.ranks, job.dp_size, job.node_size)
    return {way: rank_memory(model, replace(job, dense=way))["total"] for way in possible}


def build_strategy(config: Config) -> ExpertParallelStrategy:
    strategy = config.strategy
    return ExpertParallelStrategy(
        resolve_ep_size(config),
        strategy.timeout_s,
        async_checkpoint=strategy.async_checkpoint,
        full_checkpoint=strategy.full_checkpoint,
        dense=strategy.dense,
        dense_estimates=dense_estimates(config) if strategy.dense == "auto" else None,
        reductions=strategy.reductions,
        exchange=strategy.exchange,
        debug_collectives=strategy.debug_collectives,
    )


def build_trainer(
    config: Config, callbacks: Sequence[Callback], loggers: Sequence[Logger]
) -> Trainer:
    """ConfigError: Lightning's Trainer does not take trainer.extra."""
    trainer, strategy, threads = config.trainer, build_strategy(config), cpu_threads(config)
    set_threads = LambdaCallback(
        setup=lambda *_, **__: torch.set_num_threads(threads)
    )  # after Lightning's launcher
    try:
        return Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=strategy,
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
    except (TypeError, ValueError, MisconfigurationException) as error:
        if not trainer.extra:
            raise
        raise ConfigError(
            f"Lightning's Trainer does not take trainer.extra {show(trainer.extra)}: {error}"
        ) from error
