"""What the training of a config asks of each of its ranks, in numbers."""

import os
from dataclasses import replace
from typing import Any

from scmoe.config.derived import resolve_ep_size, samples_of_rank
from scmoe.config.fields import Config
from scmoe.config.halved_batches import possible_batches
from scmoe.parallel.dense.dense_auto import possible_modes
from scmoe.parallel.dense.memory import RankJob, rank_memory


def rank_job(config: Config) -> RankJob:
    """Return the job of a config. Its `dense` may be auto, which memory and traffic do not take."""
    trainer, data = config.trainer, config.data
    return RankJob(
        ranks=trainer.devices * trainer.num_nodes,
        ep_size=resolve_ep_size(config),
        node_size=trainer.devices,
        samples=samples_of_rank(config),
        seq_len=data.seq_len,
        accumulate=trainer.accumulate,
        precision=trainer.precision,
        dense=config.strategy.dense,
        recompute=trainer.recompute,
        on_gpu=trainer.accelerator != "cpu",
        wire_bytes=None if config.strategy.wire_dtype is None else 2,
        parts=max(possible_batches(config)),
    )


def dense_estimates(job: RankJob, model: Any) -> dict[str, float] | None:
    """Return for each mode of dense weights the bytes that a rank needs at most, activations
    included; None where strategy.dense names the mode. model: the whole network, on the meta
    device."""
    if job.dense != "auto":
        return None
    modes = possible_modes(model, job.ranks, job.dp_size, job.node_size)
    return {mode: rank_memory(model, replace(job, dense=mode))["total"] for mode in modes}


def cpu_threads(config: Config) -> int:
    """Return the CPU threads of one rank."""
    if config.trainer.threads is not None:
        return config.trainer.threads
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has no such function
    usable = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return max(1, usable // config.trainer.devices)
