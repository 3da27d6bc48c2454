"""What the training of a config asks of each of its ranks, in numbers."""

from scmoe.config.derived import resolve_ep_size, samples_of_rank
from scmoe.config.fields import Config
from scmoe.config.rules import possible_batches
from scmoe.parallel.dense.memory import RankJob


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
        batches_in_flight=max(possible_batches(config)),
    )
