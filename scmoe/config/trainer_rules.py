"""The rules of how long a training is, and of what its Trainer does on the way."""

import re
from dataclasses import fields

from scmoe.config.derived import last_step, max_steps
from scmoe.config.fields import Config, TrainerConfig
from scmoe.config.leaves import COUNT
from scmoe.config.refuse import Refusals, Remedy

STEP_RANGE = re.compile(r"(\d{1,10}):(\d{1,10})")  # of trainer.profile_steps

# Arguments of Lightning's Trainer that trainer.extra must not hold, and what decides them.
OWN_ARGUMENTS = {
    **{entry.name: f"trainer.{entry.name}" for entry in fields(TrainerConfig)},
    **dict.fromkeys(
        ("max_epochs", "min_epochs", "check_val_every_n_epoch"),
        "trainer.max_steps and trainer.val_every",
    ),
    "val_check_interval": "trainer.val_every",
    "log_every_n_steps": "trainer.log_every",
    "accumulate_grad_batches": "trainer.accumulate",
    **dict.fromkeys(
        ("gradient_clip_val", "gradient_clip_algorithm"), "trainer.gradient_clip, which is a norm"
    ),
    "profiler": "trainer.profile_steps",
    "enable_checkpointing": "trainer.checkpoint_every and trainer.save_top_k",
    "enable_progress_bar": "trainer.progress",
    "default_root_dir": "runs_dir",
    "strategy": "the section strategy",
    "logger": "the section logger",
    "callbacks": "the sections callbacks, trainer and analysis",
    **dict.fromkeys(
        ("use_distributed_sampler", "reload_dataloaders_every_n_epochs"), "the data module"
    ),
    **dict.fromkeys(("plugins", "sync_batchnorm"), "the Strategy, which is ExpertParallelStrategy"),
    "enable_model_summary": "the table of parameters that a run prints",
    "num_sanity_val_steps": "the Strategy, which checks batches before the first one",
    "barebones": "trainer.progress, logger.mode and trainer.save_top_k",
}


def length(config: Config) -> Refusals:
    """Check how long a training is. Rules that come later read the number of its steps."""
    trainer = config.trainer
    optim = config.optim
    if trainer.max_tokens is None and trainer.max_steps is None:
        none = "trainer.max_tokens is null too. Give one of them"
        yield "trainer.max_steps", Remedy(f"{none}, as a training needs an end.")
    if trainer.max_tokens is not None and trainer.max_steps is not None:
        both = f"trainer.max_steps is {trainer.max_steps} too. Set one of them to null"
        yield "trainer.max_tokens", Remedy(f"{both}: add trainer.max_steps=null to count tokens.")
    steps = max_steps(config)
    if not COUNT.has(steps):
        yield "trainer.max_tokens", Remedy(f"These are {steps} steps. Give at most {COUNT.most}.")
    after_warmup = steps - optim.warmup_steps
    if optim.decay_steps is not None and optim.decay_steps > after_warmup:
        yield (
            "optim.decay_steps",
            f"null or at most {after_warmup}, the {steps} steps less optim.warmup_steps",
        )


def trainer_rules(config: Config) -> Refusals:
    trainer = config.trainer
    last = last_step(config)
    if (trainer.limit_train_batches or 0) % trainer.accumulate:
        multiple = f"null or a multiple of trainer.accumulate, {trainer.accumulate}"
        yield "trainer.limit_train_batches", multiple
    if trainer.early_stopping is not None and trainer.val_every > last:
        why = (
            f"no validation takes place with trainer.val_every={trainer.val_every} in {last} steps"
        )
        yield "trainer.early_stopping", f"null, as {why}"
    if trainer.profile_steps is not None:
        steps = STEP_RANGE.fullmatch(trainer.profile_steps)
        if steps is None or not int(steps[1]) < int(steps[2]) <= last:
            yield "trainer.profile_steps", f"null or A:B with A < B <= {last}, the number of steps"
    for name in sorted(trainer.extra.keys() & OWN_ARGUMENTS.keys()):
        yield "trainer.extra", Remedy(f"Remove {name}: {OWN_ARGUMENTS[name]} decides it.")
    if "max_time" in trainer.extra and trainer.accumulate > 1:
        between = "With trainer.accumulate above 1, max_time may end a run between a step's batches"
        yield "trainer.extra", Remedy(f"{between}. Use trainer.accumulate=1.")
