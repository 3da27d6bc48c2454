"""What a training knows before it begins: the one value between `load` and the model.

`train` makes it from the configuration. The checks of the machine, the printout, the loggers and
the Trainer read it, so that nothing in it is worked out twice.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from scmoe.config.derived import last_step, shortened
from scmoe.config.fields import Config
from scmoe.estimate.memory import Job, rank_memory
from scmoe.files.writing import redacted
from scmoe.parallel.dense import ways
from scmoe.training.assembly.model import build_model_on_meta


@dataclass(frozen=True)
class Start:
    """A configuration and what follows from it, on this machine or another.

    config: with the short trial's settings where trainer.fast_dev_run is set. redacted: the same
    without keys and passwords, for files, loggers and the console. job: what the training asks of
    each rank, such as ep_size. last_step: the optimizer step after which it ends.
    """

    config: Config
    redacted: Config
    job: Job
    last_step: int

    @classmethod
    def of(cls, config: Config) -> "Start":
        config = shortened(config)
        return cls(config, redacted(config), Job.of(config), last_step(config))

    @cached_property
    def model(self) -> Any:
        """The whole network on the meta device, built at the first use. Ranks other than 0 need it
        for strategy.dense=auto only. ConfigError: an extension's network cannot be used."""
        return build_model_on_meta(self.config)


def dense_estimates(start: Start) -> dict[str, float] | None:
    """Return for each way of keeping dense weights the bytes that a rank needs at most, activations
    included; None where strategy.dense names the way."""
    job = start.job
    if job.dense != "auto":
        return None
    possible = ways(start.model, job.ranks, job.dp_size, job.node_size)
    return {way: rank_memory(start.model, replace(job, dense=way))["total"] for way in possible}
