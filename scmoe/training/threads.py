"""How many CPU threads a rank uses."""

import os

from scmoe.config.fields import Config


def cpu_threads(config: Config) -> int:
    """Return the CPU threads of one rank."""
    if config.trainer.threads is not None:
        return config.trainer.threads
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has no such function
    usable = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return max(1, usable // config.trainer.devices)
