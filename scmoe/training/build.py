"""From configuration to objects: the only reader of the config tree, and the only factory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn

from datamodules.sequences import SequenceDataModule
from datamodules.synthetic import SyntheticDataModule
from datamodules.text import TextDataModule
from scmoe.blocks.recompute import recompute_activations
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import DenseBlock, SharedExpertBlock, TopKBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.config import Config, flatten, resolve_ep_size, to_yaml
from scmoe.models.gpt import GPT, init_gpt_weights
from scmoe.moe.coefficient import COEFFICIENT_GATES
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.strategy import ExpertParallelStrategy
from scmoe.schedule.plan import Schedule
from scmoe.training import logging
from scmoe.training.callbacks import DataPosition, ExpertLoad, LogLines, StepProgressBar, Threads, Throughput
from scmoe.training.module import LanguageModel

# ---------------------------------------------------------------------- model


def build_model(config: Config, context: ParallelContext) -> GPT:
    """The network with this rank's experts, weights drawn from the seed."""
    model = config.model
    gpt = GPT(config.data.vocab_size, config.data.seq_len, model.dim, build_blocks(config, context), model.dropout)
    init_gpt_weights(gpt, config.seed, model.layers)
    if config.trainer.recompute:
        recompute_activations(gpt)
    return gpt


def build_model_on_meta(config: Config) -> GPT:
    """The whole network's shapes, without memory: to count parameters before anything is started."""
    with torch.device("meta"):
        model = config.model
        return GPT(config.data.vocab_size, config.data.seq_len, model.dim, build_blocks(config, ParallelContext()))


def build_blocks(config: Config, context: ParallelContext) -> list[nn.Module]:
    """Blocks with an MoE each (every: 1), or pairs of Block-MLP and Block-MoE (every: 2), or dense blocks."""
    model, moe = config.model, config.moe
    if moe.architecture == "dense":
        return [DenseBlock([attention(config), mlp(config)]) for _ in range(model.layers)]
    return [build_moe_block(config, context, first=i == 0) for i in range(model.layers // moe.every)]


def build_moe_block(config: Config, context: ParallelContext, first: bool) -> nn.Module:
    model, moe = config.model, config.moe
    sublayers = [attention(config)]
    if moe.every == 2:
        sublayers += [mlp(config), attention(config)]
    stream = build_stream(config, context)
    if moe.architecture == "top_k":
        return TopKBlock(sublayers, norm(config), stream, model.dropout)
    shared_expert = MLP(model.dim, ffn_dim(config))
    coefficient = COEFFICIENT_GATES[moe.combine](model.dim)
    if moe.architecture == "shared_expert":
        schedule = Schedule("shared_expert", config.schedule.expert_slot, config.schedule.chunks)
        return SharedExpertBlock(sublayers, norm(config), shared_expert, coefficient, stream, schedule, model.dropout)
    position = moe.first_position if first and moe.first_position else moe.position
    schedule = Schedule(position, config.schedule.expert_slot, config.schedule.chunks)
    following = sublayers[len(sublayers) - (len(schedule.window) - 1)]  # the sub-layer after the tap
    return ShortcutBlock(
        sublayers,
        tap_norm=following.norm if moe.tap_norm == "shared" else norm(config),
        norm=norm(config),
        shared_expert=shared_expert,
        coefficient=coefficient,
        moe=stream,
        schedule=schedule,
        dropout=model.dropout,
        coefficient_reads_tap=moe.coefficient_input == "tap",
    )


def build_stream(config: Config, context: ParallelContext) -> MoEStream:
    dim, moe = config.model.dim, config.moe
    router = Router(dim, moe.num_experts, moe.top_k, noisy=moe.noisy, balanced=moe.balanced_routing)
    experts = Experts(dim, ffn_dim(config), moe.num_experts, context.local_experts(moe.num_experts))
    dispatcher = context.dispatcher(moe.num_experts, moe.dropless_ceiling)
    return MoEStream(router, experts, dispatcher, moe.capacity_factor, config.schedule.chunks)


def attention(config: Config) -> Residual:
    return Residual(norm(config), Attention(config.model.dim, config.model.heads), config.model.dropout)


def mlp(config: Config) -> Residual:
    return Residual(norm(config), MLP(config.model.dim, ffn_dim(config)), config.model.dropout)


def norm(config: Config) -> nn.Module:
    return nn.LayerNorm(config.model.dim)


def ffn_dim(config: Config) -> int:
    return config.model.ffn_dim or 4 * config.model.dim


# ---------------------------------------------------------------------- training


def build_module(config: Config) -> LanguageModel:
    optim, moe = config.optim, config.moe
    return LanguageModel(
        lambda context: build_model(config, context),
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


def build_datamodule(config: Config) -> SequenceDataModule:
    data, trainer = config.data, config.trainer
    common: dict[str, Any] = dict(
        vocab_size=data.vocab_size,
        seq_len=data.seq_len,
        global_batch_size=data.global_batch_size,
        accumulate=trainer.accumulate,
        num_batches=trainer.max_steps * trainer.accumulate,
        val_sequences=data.val_sequences,
        workers=data.workers,
        seed=config.seed,
    )
    if data.name == "synthetic":
        return SyntheticDataModule(**common)
    return TextDataModule(
        data.name, data.path, data.subset, tokenizer=data.tokenizer, cache_dir=data.cache_dir, **common
    )


def seed_everything(config: Config) -> None:
    """Global generators, alike on every rank; the strategy makes them differ once the weights are drawn."""
    lightning.pytorch.seed_everything(config.seed, verbose=False)


def build_run_dir(config: Config, overrides: Sequence[str]) -> Path:
    return logging.create_run_dir(Path(config.runs_dir), config.name, overrides, to_yaml(config))


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
    callbacks: list[Callback] = [
        DataPosition(),
        ExpertLoad(),
        Throughput(data.global_batch_size // trainer.accumulate * data.seq_len),
        ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=trainer.checkpoint_every, save_top_k=1),
        ModelCheckpoint(checkpoints, "best-{step}", monitor="val/bits_per_byte", save_top_k=1),
    ]
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
