"""From configuration to objects: with build_model.py the only reader of the config tree, and the only factory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from datamodules.positioned import PositionedDataModule
from datamodules.synthetic import SyntheticDataModule
from datamodules.text import TextDataModule
from scmoe.config import Config, flatten, resolve_ep_size, to_yaml
from scmoe.config_check import IMAGES, ConfigError
from scmoe.parallel.strategy import ExpertParallelStrategy
from scmoe.training import logging
from scmoe.training.analysis_callbacks import gating_over_training, similarity_over_training
from scmoe.training.base import MoEModule
from scmoe.training.build_model import build_model_to_train
from scmoe.training.callbacks import (
    DataPosition,
    ExpertLoad,
    LoggedStep,
    LogLines,
    StepProgressBar,
    Threads,
    Throughput,
)
from scmoe.training.classifier import ImageClassifier
from scmoe.training.module import LanguageModel
from scmoe.training.planning import PlanSchedule

# ---------------------------------------------------------------------- training


def build_module(config: Config) -> MoEModule:
    optim, moe = config.optim, config.moe
    images = config.data.name in IMAGES
    task = partial(ImageClassifier, num_classes=config.data.num_classes) if images else LanguageModel
    return task(
        partial(build_model_to_train, config),  # a lambda could not be sent to processes that are spawned
        max_steps=config.trainer.max_steps,
        lr=optim.lr,
        min_lr_ratio=optim.min_lr_ratio,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        gradient_clip=config.trainer.gradient_clip,
        load_balance_coef=moe.load_balance_coef,
        z_loss_coef=moe.z_loss_coef,
        compile_blocks=config.trainer.compile,
    )


def build_datamodule(config: Config) -> PositionedDataModule:
    data, trainer = config.data, config.trainer
    common: dict[str, Any] = dict(
        global_batch_size=data.global_batch_size,
        accumulate=trainer.accumulate,
        num_batches=trainer.max_steps * trainer.accumulate,
        workers=data.workers,
        seed=config.seed,
    )
    if data.name in IMAGES:
        return build_images(config, common)
    common |= dict(vocab_size=data.vocab_size, seq_len=data.seq_len, val_sequences=data.val_sequences)
    if data.name == "synthetic":
        return SyntheticDataModule(**common)
    try:
        return TextDataModule(
            data.name, data.path, data.subset, tokenizer=data.tokenizer, cache_dir=data.cache_dir, **common
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_images(config: Config, common: dict[str, Any]) -> PositionedDataModule:
    """Opens the images, so that what is missing is said before a process is started."""
    from datamodules.image_sources import open_images  # here: they need the extra `vision`
    from datamodules.images import ImageDataModule

    data = config.data
    try:
        return ImageDataModule(
            open_images(data.name, data.path),
            image_size=data.image_size,
            num_classes=data.num_classes,
            augment=data.augment,
            mixup=data.mixup,
            cutmix=data.cutmix,
            label_smoothing=data.label_smoothing,
            val_images=data.val_sequences,
            **common,
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error


def seed_everything(config: Config) -> None:
    """Global generators, alike on every rank; the strategy makes them differ once the weights are drawn."""
    lightning.pytorch.seed_everything(config.seed, verbose=False)


def build_run_dir(config: Config, overrides: Sequence[str]) -> Path:
    kept = to_yaml(logging.without_keys(config))
    return logging.create_run_dir(Path(config.runs_dir), config.name, overrides, kept)


def build_loggers(config: Config, run_dir: Path, resumed_step: int | None) -> list[Logger]:
    """metrics.csv always, W&B unless disabled. resumed_step: of the checkpoint that the run goes on from."""
    wandb = config.logger
    loggers: list[Logger] = [logging.csv_logger(run_dir, resumed_step)]
    if wandb.mode != "disabled":
        mode = logging.wandb_mode(wandb.mode)
        loggers.append(
            logging.wandb_logger(
                run_dir,
                mode,
                wandb.project,
                wandb.group,
                wandb.tags,
                config=flatten(config),
                may_go_offline=wandb.mode == "auto",
            )
        )
    return loggers


def build_callbacks(config: Config, run_dir: Path | None) -> list[Callback]:
    """run_dir: rank 0's; the other ranks are told by ModelCheckpoint itself."""
    data, trainer = config.data, config.trainer
    checkpoints = None if run_dir is None else run_dir / "checkpoints"
    images, micro_batch = data.name in IMAGES, data.global_batch_size // trainer.accumulate
    best, mode = ("val/accuracy", "max") if images else ("val/bits_per_byte", "min")
    callbacks: list[Callback] = [
        DataPosition(),
        LoggedStep(),
        ExpertLoad(),
        Throughput("images_per_s", micro_batch) if images else Throughput("tokens_per_s", micro_batch * data.seq_len),
        ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=trainer.checkpoint_every, save_top_k=1),
        ModelCheckpoint(checkpoints, "best-{step}", monitor=best, mode=mode, save_top_k=1),
    ]
    if config.moe.architecture not in ("dense", "dgmoe_share") and not trainer.compile:
        chunks = config.schedule.chunks
        callbacks.append(PlanSchedule(config.schedule.auto, (1, 2, 4) if chunks is None else (chunks,)))
    if config.analysis.gating_every is not None:
        callbacks.append(gating_over_training(config.analysis.gating_every, run_dir, config.moe.position))
    if config.analysis.similarity_every is not None:
        callbacks.append(similarity_over_training(config.analysis.similarity_every, run_dir))
    if trainer.progress:
        callbacks.append(StepProgressBar() if sys.stdout.isatty() else LogLines())
    return callbacks


def build_trainer(config: Config, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> Trainer:
    trainer = config.trainer
    threads = trainer.threads or max(1, len(os.sched_getaffinity(0)) // trainer.devices)
    return Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=ExpertParallelStrategy(
            resolve_ep_size(config),
            config.strategy.timeout_s,
            config.strategy.async_checkpoint,
            config.strategy.debug_collectives,
            config.strategy.full_checkpoint,
        ),
        precision=trainer.precision,
        max_steps=trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=trainer.accumulate,
        val_check_interval=trainer.val_every * trainer.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=trainer.log_every,
        deterministic=trainer.deterministic,
        use_distributed_sampler=False,
        enable_progress_bar=trainer.progress and sys.stdout.isatty(),
        enable_model_summary=False,
        callbacks=[*callbacks, Threads(threads)],
        logger=list(loggers),
    )
