"""Builds the Trainer of a configuration, with its strategy and callbacks."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, show
from scmoe.config.registry import CALLBACKS, IMAGES
from scmoe.config.rules import last_step, resolve_ep_size, validates
from scmoe.footprint.memory import Job, rank_memory
from scmoe.lightning.seam import LastCheckpoint, StepProgressBar
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel.dense_choice import ways
from scmoe.probes.gating import GatingProbe, draw_gating, gating_means, gating_metrics
from scmoe.probes.similarity import SimilarityProbe, draw_similarity, similarity_mean, similarity_metrics
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.callbacks.adaptive_schedule import AdaptiveSchedule
from scmoe.training.callbacks.analysis import Analysis
from scmoe.training.callbacks.data_position import DataPosition
from scmoe.training.callbacks.expert_load import ExpertLoad
from scmoe.training.callbacks.gradient_norms import GradientNorms
from scmoe.training.callbacks.kept_config import KeptConfig
from scmoe.training.callbacks.log_lines import LogLines
from scmoe.training.callbacks.peak_memory import Memory
from scmoe.training.callbacks.profile import ProfileSteps
from scmoe.training.callbacks.skipped_images import SkippedImages
from scmoe.training.callbacks.step_times import StepTimes
from scmoe.training.callbacks.throughput import Throughput

register_callback = CALLBACKS.register
# fields of config.strategy
PASSED_ON = ("async_checkpoint", "full_checkpoint", "dense", "reductions", "exchange", "debug_collectives")


def seed_everything(config: Config) -> None:
    """Seed the global generators equally on all ranks. The strategy lets them differ inside training steps."""
    lightning.pytorch.seed_everything(config.seed, verbose=False)


def build_callbacks(config: Config, run_dir: Path | None) -> list[Callback]:
    """run_dir: on rank 0; None on other ranks, where ModelCheckpoint gets its folder from rank 0."""
    data, trainer = config.data, config.trainer
    checkpoints, analysis = (run_dir / name if run_dir else None for name in ("checkpoints", "analysis"))
    images, micro_batch = data.name in IMAGES, data.global_batch_size // trainer.accumulate
    best, mode = ("val/accuracy", "max") if images else ("val/bits_per_byte", "min")
    callbacks: list[Callback] = [
        DataPosition(),
        KeptConfig(config),
        ExpertLoad(analysis if config.analysis.expert_load else None),
        Throughput(micro_batch, None if images else data.seq_len, trainer.peak_tflops),
        StepTimes(),
        GradientNorms(),
        Memory(),
        LastCheckpoint(checkpoints, trainer.checkpoint_every),
    ]
    if validates(config) and trainer.save_top_k:
        name, kept = "best-{step}", trainer.save_top_k
        callbacks.append(ModelCheckpoint(checkpoints, name, monitor=best, mode=mode, save_top_k=kept))
    if trainer.early_stopping is not None:
        callbacks.append(
            EarlyStopping(best, patience=trainer.early_stopping, mode=mode, check_on_train_epoch_end=False)
        )
    if trainer.profile_steps is not None:
        callbacks.append(ProfileSteps(trainer.profile_steps, run_dir))
    if config.moe.architecture not in ("dense", "dgmoe_share"):
        chunks, plan = config.schedule.chunks, run_dir / "plan.json" if run_dir else None
        settings = {key: getattr(trainer, key) for key in ("num_nodes", "precision", "threads", "compile", "recompute")}
        settings |= {key: getattr(config.strategy, key) for key in ("wire_dtype", "exchange", "dense", "reductions")}
        tried = (1, 2, 4) if chunks is None else (chunks,)
        callbacks.append(AdaptiveSchedule(config.schedule.auto, tried, plan, settings))
    if images and data.on_error == "skip":
        callbacks.append(SkippedImages())
    if (every := config.analysis.gating_every) is not None:
        probe = partial(GatingProbe, position=config.moe.position)
        callbacks.append(Analysis("gating", every, analysis, probe, gating_means, gating_metrics, draw_gating))
    if (every := config.analysis.similarity_every) is not None:
        functions = SimilarityProbe, similarity_mean, similarity_metrics, draw_similarity
        callbacks.append(Analysis("similarity", every, analysis, *functions))
    if trainer.progress:
        callbacks.append(StepProgressBar() if sys.stderr.isatty() else LogLines())
    return callbacks + [CALLBACKS[name](**options) for name, options in config.callbacks.items()]


def cpu_threads(config: Config) -> int:
    """Return the CPU threads of one rank."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))  # macOS has no such function
    return config.trainer.threads or max(1, len(usable(0)) // config.trainer.devices)


def dense_estimates(config: Config) -> dict[str, float]:
    """Return for each way of keeping dense weights the bytes that a rank needs at most, activations included."""
    job, model = Job.of(config), build_model_on_meta(config)
    return {way: rank_memory(model, replace(job, dense=way))["total"] for way in ways(job.ranks, job.node_size)}


def build_trainer(config: Config, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Trainer:
    """ConfigError: Lightning's Trainer does not take trainer.extra."""
    trainer, strategy = config.trainer, config.strategy
    threads = cpu_threads(config)
    set_threads = LambdaCallback(setup=lambda *_, **__: torch.set_num_threads(threads))  # after Lightning's launcher
    passed_on = {name: getattr(strategy, name) for name in PASSED_ON}
    estimates = dense_estimates(config) if strategy.dense == "auto" else None
    arguments: dict[str, Any] = {
        "accelerator": trainer.accelerator,
        "devices": trainer.devices,
        "num_nodes": trainer.num_nodes,
        "strategy": ExpertParallelStrategy(
            resolve_ep_size(config), strategy.timeout_s, dense_estimates=estimates, **passed_on
        ),
        "precision": trainer.precision,
        "max_steps": last_step(config),
        "max_epochs": -1,
        "accumulate_grad_batches": trainer.accumulate,
        "val_check_interval": trainer.val_every * trainer.accumulate,
        "check_val_every_n_epoch": None,
        "limit_val_batches": trainer.limit_val_batches,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": trainer.log_every,
        "deterministic": trainer.deterministic,
        "use_distributed_sampler": False,
        "enable_progress_bar": trainer.progress and sys.stderr.isatty(),
        "enable_model_summary": False,
        "callbacks": [*callbacks, set_threads],
        "logger": list(loggers),
    }
    try:
        return Trainer(**arguments, **trainer.extra)
    except (TypeError, ValueError, MisconfigurationException) as error:
        if not trainer.extra:
            raise
        allowed = "allowed: further arguments of Lightning's Trainer"
        raise ConfigError(f"trainer.extra is {show(trainer.extra)}, {allowed}: {error}") from error
