"""What follows from a configuration: how its blocks are wired, how many ranks share experts, which
step is the last.
"""

import math
from dataclasses import replace

from scmoe.blocks.wirings import Wiring
from scmoe.config.fields import Config

FAMILY_ACTIVATIONS = {"gpt": "gelu", "llama": "swiglu"}  # what model.activation: null means
# Architectures with a tap, and those of their schedules.
SHORTCUT_SCHEDULES = {"scmoe": "scmoe", "dgmoe": "dgmoe", "dgmoe_share": "dgmoe"}


def resolve_wiring(config: Config, architecture: str | None = None) -> Wiring:
    """Return how the blocks with an MoE are wired. architecture: of the blocks, if it is not that
    of the configuration."""
    moe = config.moe
    return Wiring(
        architecture or SHORTCUT_SCHEDULES.get(moe.architecture, moe.architecture),
        moe.every,
        moe.position,
        moe.first_position,
        moe.tap_norm,
        moe.combine,
        moe.coefficient_input,
        moe.after_norm,
        moe.distinct_experts,
    )


def resolve_ep_size(config: Config) -> int:
    """Return the number of expert-parallel ranks: as configured, else the largest that divides the
    experts and a machine's devices."""
    if config.strategy.ep_size is not None:
        return config.strategy.ep_size
    if config.moe.architecture == "dense":
        return 1
    return math.gcd(config.moe.num_experts, config.trainer.devices)


def samples_of_rank(config: Config) -> int:
    """Return the samples of a rank in one of the batches that a step accumulates."""
    trainer = config.trainer
    batches = trainer.devices * trainer.num_nodes * trainer.accumulate
    return config.data.global_batch_size // max(1, batches)  # 0 in a file that is not checked yet


def rows_are_filled(config: Config) -> bool:
    """Return whether only filled slots are sent and computed. moe.rows=auto means that on a CPU,
    where the host knows the counts without waiting."""
    rows = config.moe.rows
    return rows == "filled" or (rows == "auto" and config.trainer.accelerator == "cpu")


def max_steps(config: Config) -> int:
    """Return the number of optimizer steps of the whole training: trainer.max_steps, or as many as
    reach trainer.max_tokens. Validation has refused a configuration that has both or neither."""
    trainer = config.trainer
    if trainer.max_tokens is None:
        assert trainer.max_steps is not None
        return trainer.max_steps
    return steps_for(trainer.max_tokens, config.data.global_batch_size, config.data.seq_len)


def steps_for(tokens: int, global_batch_size: int, seq_len: int) -> int:
    """Return the number of whole optimizer steps that train on so many tokens or more. A step's
    batch is that of all ranks and of all accumulated batches."""
    return -(-tokens // (global_batch_size * seq_len))


def word_for_steps(config: Config, steps: int) -> str:
    """Return the override that sets the length of a training to so many steps: trainer.max_steps,
    or trainer.max_tokens where the configuration counts tokens."""
    if config.trainer.max_tokens is None:
        return f"trainer.max_steps={steps}"
    return f"trainer.max_tokens={steps * config.data.global_batch_size * config.data.seq_len}"


def last_step(config: Config) -> int:
    """Return the number of optimizer steps after which a run ends."""
    trainer = config.trainer
    steps = max_steps(config)
    if trainer.limit_train_batches is None:
        return steps
    return min(steps, trainer.limit_train_batches // trainer.accumulate)


def shortened(config: Config) -> Config:
    """Return the configuration of the trial where fast_dev_run is set, otherwise the configuration
    as it is.

    One optimizer step and one batch of validation. The only logger is metrics.csv, and the only
    checkpoint is that of the end.
    """
    if not config.trainer.fast_dev_run:
        return config
    trainer = replace(
        config.trainer,
        max_steps=1,
        max_tokens=None,
        log_every=1,
        limit_train_batches=None,
        limit_val_batches=1,
        save_top_k=0,
        early_stopping=None,
        profile_steps=None,
    )
    logger = replace(config.logger, mode="disabled", tensorboard=False)
    return replace(config, trainer=trainer, logger=logger)
