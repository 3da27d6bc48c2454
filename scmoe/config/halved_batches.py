"""Two batches in flight in a configuration (schedule.batches_in_flight): where they cannot run or
would change nothing, which numbers a training can have, and the overrides that set a number.
"""

from collections.abc import Iterator
from dataclasses import replace

from scmoe.config.derived import resolve_ep_size
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.model_fields import ScheduleConfig
from scmoe.config.refuse import Refusals, Remedy

KEY = "schedule.batches_in_flight"
IN_ONE_BATCH = f"{KEY}=null"
# Overrides of a schedule whose rows stay on their rank.
SENDS_NO_ROWS = (IN_ONE_BATCH, "schedule.transfers=overlapped")


def two_batches_unread(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield why two batches in flight would change nothing, as unread.py does."""
    if config.schedule.batches_in_flight != 2:
        return
    if config.moe.architecture == "dgmoe_share":
        yield "two pairs share one MoE module", (KEY,)
    if resolve_ep_size(config) == 1:
        yield "no rows travel where every rank has all experts (strategy.ep_size)", (KEY,)


def two_batches(config: Config) -> Refusals:
    """Check the schedule of a model with two batches in flight."""
    schedule = config.schedule
    if schedule.batches_in_flight != 2:
        return
    if schedule.transfers == "sequential":
        yield KEY, "1 where schedule.transfers=sequential, which leaves nothing to hide"
    if schedule.auto:
        yield KEY, "null | 1, as schedule.auto=true chooses it"


def two_batches_in_training(config: Config) -> Refusals:
    """Check a training with two batches in flight: a rank has a sequence for each of them, and no
    probe counts the calls of a module."""
    if config.schedule.batches_in_flight != 2:
        return
    trainer = config.trainer
    batches = trainer.devices * trainer.num_nodes * trainer.accumulate
    if config.data.global_batch_size < 2 * batches:
        yield (
            KEY,
            Remedy(
                "A rank's batch has one sequence (image), which has no halves. Raise"
                f" data.global_batch_size to {2 * batches} or more, or use one batch in flight."
            ),
        )
    measured = config.analysis
    for probe in ("gating_every", "similarity_every", "gradients_every", "record_routing"):
        if getattr(measured, probe) is not None:
            yield f"analysis.{probe}", f"null, as {KEY}=2 calls each module twice a batch"


def check_samples(config: Config, samples: int) -> None:
    """Raise ConfigError for samples=N of a rank in a batch that two batches in flight cannot
    halve."""
    if config.schedule.batches_in_flight == 2 and samples < 2:
        raise ConfigError(
            f"command line: samples is {samples}, but {KEY}=2 halves a rank's batch. Give"
            " samples=2 or more"
        )


def may_run_two_batches(config: Config) -> bool:
    """Return whether schedule.auto may choose two batches in flight: a configuration that sets them
    would be accepted, and they cannot end the run. With moe.dropless_ceiling they could: it limits
    the rows of a half, and one half may exceed it where the whole batch does not.
    """
    if config.schedule.auto and config.schedule.batches_in_flight == 1:
        return False
    if config.moe.dropless_ceiling is not None:
        return False
    schedule = replace(config.schedule, auto=False, batches_in_flight=2)
    two = replace(config, schedule=schedule)
    checks = (two_batches_unread, two_batches, two_batches_in_training)
    return not any(True for check in checks for _ in check(two))


def without_number(schedule: ScheduleConfig) -> ScheduleConfig:
    """Return a schedule that leaves the number of batches in flight open."""
    return replace(schedule, batches_in_flight=None)


def possible_batches(config: Config) -> tuple[int, ...]:
    """Return the numbers of batches in flight that a training can have: the configured one, or
    those from which schedule.auto chooses."""
    if config.schedule.auto:
        return (1, 2) if may_run_two_batches(config) else (1,)
    return (config.schedule.batches_in_flight or 1,)


def travel_overrides(config: Config) -> list[str]:
    """Return the overrides that let rows between ranks travel as in this training."""
    schedule = config.schedule
    batches = "null" if schedule.batches_in_flight is None else schedule.batches_in_flight
    return [f"{KEY}={batches}", f"schedule.transfers={schedule.transfers}"]


def schedule_of_one_rank(schedule: ScheduleConfig) -> ScheduleConfig:
    """Return the schedule with rows that stay on their rank."""
    return replace(schedule, batches_in_flight=None, transfers="overlapped")
