"""The job that `scmoe advise` judges: a config on the ranks of a cluster, and its batches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from scmoe.config.fields import Config
from scmoe.config.halved_batches import without_number
from scmoe.config.leaves import ConfigError
from scmoe.config.rules import validate
from scmoe.loads import BALANCED
from scmoe.parallel.dense.memory import RankJob
from scmoe.predict.asked_config import AskedConfig
from scmoe.predict.cluster import Profile
from scmoe.predict.timed_blocks import JobSizes
from scmoe.training.assembly.rank_job import rank_job

SET_BY_REQUEST = (  # keys of a config in whose place words of the request and the cluster count
    "strategy.ep_size",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
)
JUDGED = ("top_k", "shared_expert", "scmoe", "farskip")
BATCHES = (2, 4, 8, 16)  # into which a preset's step is divided where the memory is too little


@dataclass(frozen=True)
class Request:
    """A job to be judged. None of ranks, ep_size, samples: all of the cluster, every number that
    divides ranks and experts, and the config's.

    samples: of a rank in one batch; with tensor parallelism, of the ranks that share a weight.
    stage_layers: of a rank's stage of a pipeline; None: no pipeline. copies: expert: each copy of a
    token travels; node: one row for each node does. wire: fp8: rows are dispatched in 8 bits.
    prefill: a forward pass is judged, as of prompts, not a step. top1: is compared too.
    """

    config: AskedConfig
    ranks: int | None = None
    ep_size: int | None = None
    samples: int | None = None
    stage_layers: int | None = None
    tensor_parallel: int = 1
    copies: Literal["expert", "node"] = "expert"
    wire: Literal["fp8"] | None = None
    transfers_again: bool = False
    prefill: bool = False
    top1: bool = False
    load: str = BALANCED


class Job(NamedTuple):
    """What all rows share. training: what the job asks of a rank. sizes: with an EP of 1. ep_sizes:
    that are tried. prefill: a forward pass is judged, not a step. trained_ep_size: the config's
    strategy.ep_size."""

    config: Config
    training: RankJob
    sizes: JobSizes
    ep_sizes: tuple[int, ...]
    tokens: int  # of all ranks in a step
    knows_memory: bool
    prefill: bool = False
    trained_ep_size: int | None = None

    @property
    def samples(self) -> int:
        """Those of a rank in one batch."""
        return self.training.samples

    @property
    def accumulate(self) -> int:
        """The batches of a step."""
        return self.training.accumulate

    def at(self, ep_size: int) -> JobSizes:
        return self.sizes._replace(ep_size=ep_size)


# ---------------------------------------------------------------------- the job


def smaller_requests(request: Request) -> Iterator[Request]:
    """Yield a preset's request with its step in more and more batches. Nothing if samples or
    trainer.accumulate is given, or prefill is judged."""
    asked = request.config
    fixed = request.samples or request.prefill or "trainer.accumulate" in asked.typed
    if asked.has_batch or fixed:
        return
    for batches in BATCHES:
        if asked.usual_samples % batches == 0:
            samples = asked.usual_samples // batches
            yield replace(request, samples=samples, config=asked.with_accumulate(batches))


def job_in_batches(request: Request, profile: Profile) -> Job:
    """Return the job with the batches that a request says."""
    check_words(request, profile)
    ranks, stages = ranks_of_stage(request, profile)
    groups = ranks // request.tensor_parallel  # each has its own samples
    samples, accumulate = batches_of(request, groups)
    config = judged_config(request, profile, ranks, samples, accumulate)
    missing = 0.0
    if request.stage_layers is not None:
        missing = stages - request.config.values.model.layers / request.stage_layers
    training = rank_job(config)
    sent = (training.wire_bytes or training.compute_bytes) / training.compute_bytes
    sizes = JobSizes(
        ranks,
        1,
        sent=1 / training.compute_bytes if request.wire == "fp8" else sent,
        received=sent,
        tensor_parallel=request.tensor_parallel,
        once_a_node=request.copies == "node",
        split=config.strategy.dense != "replicated",
        transfers_again=request.transfers_again,
        stages=stages,
        missing=missing,
    )
    tokens = 1 if config.model.family == "swin" else config.data.seq_len
    return Job(
        config,
        training,
        sizes,
        ep_sizes_of(request, config, ranks),
        tokens * samples * groups * accumulate,
        # what a stage, split products or a prompt allocate is not estimated
        knows_memory=stages == 1 and request.tensor_parallel == 1 and not request.prefill,
        prefill=request.prefill,
        trained_ep_size=request.config.values.strategy.ep_size,
    )


def judged_config(
    request: Request, profile: Profile, ranks: int, samples: int, accumulate: int
) -> Config:
    """Return the config of a stage of the job: on these ranks, with as many ranks that share the
    experts as can, and with one batch in flight, as two are compared with it."""
    asked = request.config.values
    node = min(ranks, profile.ranks_per_node)
    trainer = replace(
        asked.trainer,
        precision=profile.precision,
        accelerator="cpu" if profile.precision == "32-true" else "gpu",
        devices=node,
        num_nodes=ranks // node,
        accumulate=accumulate,
    )
    # the ranks that share a weight count as having these samples each; JobSizes divides them
    data = replace(asked.data, global_batch_size=ranks * samples * accumulate)
    if request.prefill:  # what is mixed in pairs is training's alone
        data = replace(data, mixup=0.0, cutmix=0.0)
    config = replace(
        asked,
        trainer=trainer,
        data=data,
        strategy=replace(asked.strategy, ep_size=math.gcd(asked.moe.num_experts, ranks)),
        schedule=without_number(asked.schedule),
        model=replace(asked.model, layers=request.stage_layers or asked.model.layers),
    )
    validate(config, request.config.source)
    return config


def check_words(request: Request, profile: Profile) -> None:
    """Raise ConfigError for a key that the request or the cluster sets, and for a setting that the
    advice cannot honour."""
    asked = request.config
    for key in SET_BY_REQUEST:
        if key in asked.typed:
            raise ConfigError(
                f"command line: {key} is given, but ranks=N, ep=N and the cluster set it. Give"
                " those alone."
            )
    if any(key.partition(".")[0] == "schedule" for key in asked.typed):
        raise ConfigError(
            "command line: schedule is given, but advise compares slots, chunks and batches in"
            " flight. Leave it out."
        )
    precision = asked.values.trainer.precision
    if "trainer.precision" in asked.typed and precision != profile.precision:
        raise ConfigError(
            f"command line: trainer.precision is given, but the rates of cluster {profile.name} are"
            f" those of {profile.precision}. Leave it out, or write a profile of another precision"
        )
    check(asked.values)
    computed_again = asked.values.trainer.recompute and not request.prefill
    if request.transfers_again and not computed_again:
        raise ConfigError(
            "command line: repeat_transfers is true, but nothing is computed again. Add"
            " trainer.recompute=true, or leave it out."
        )


def ranks_of_stage(request: Request, profile: Profile) -> tuple[int, int]:
    """Return the ranks of a stage of the pipeline, and the number of stages."""
    config = request.config.values
    ranks = request.ranks or profile.ranks
    if ranks > profile.ranks:
        raise ConfigError(
            f"command line: ranks is {ranks}, allowed: up to {profile.ranks}, those of cluster"
            f" {profile.name}"
        )
    layers = config.model.layers
    stages = 1
    if request.stage_layers is not None:
        if config.model.family == "swin":
            raise ConfigError(
                "command line: stage_layers is given, but blocks of model.family=swin differ, and"
                " all blocks of a pipeline are taken as equal. Leave it out."
            )
        stages = math.ceil(layers / request.stage_layers)
        if request.stage_layers > layers or ranks % stages:
            raise ConfigError(
                f"command line: stage_layers is {request.stage_layers}, so the {layers} layers need"
                f" {stages} stages, allowed: up to {layers} layers, and a number of stages that"
                f" divides the {ranks} ranks"
            )
    if stages > 1 and config.moe.leading_dense:
        raise ConfigError(
            "command line: stage_layers is given, but the config has moe.leading_dense, and all"
            " blocks are taken as equal. Add moe.leading_dense=[]."
        )
    of_stage = ranks // stages
    node = min(of_stage, profile.ranks_per_node)
    if ranks > profile.ranks_per_node and stages > 1 and profile.ranks_per_node % node:
        raise ConfigError(
            f"command line: stage_layers is {request.stage_layers}, so a stage has {of_stage} ranks"
            f" and lies across nodes of {profile.ranks_per_node}. Give a number of layers with"
            f" which a stage's ranks divide {profile.ranks_per_node} or are a multiple of it"
        )
    if of_stage % node:
        raise ConfigError(
            f"command line: ranks is {ranks}, allowed: multiples of {node * stages}, the ranks of a"
            " node for each stage"
        )
    if node % request.tensor_parallel:
        raise ConfigError(
            f"command line: tensor_parallel is {request.tensor_parallel}, allowed: divisors of"
            f" {node}, the ranks of a node"
        )
    return of_stage, stages


def batches_of(request: Request, groups: int) -> tuple[int, int]:
    """Return the samples of a rank in one batch, and the batches of a step. groups: of ranks with
    samples of their own."""
    asked = request.config
    config = asked.values
    accumulate = config.trainer.accumulate
    if accumulate < 1:
        raise ConfigError(f"trainer.accumulate is {accumulate}, allowed: 1 or more")
    is_given = "trainer.accumulate" in asked.typed
    if request.prefill:
        if is_given and accumulate > 1:
            raise ConfigError(
                "command line: trainer.accumulate is given, but a prompt's pass is one batch. Leave"
                " it out."
            )
        return request.samples or 1, 1
    if not asked.has_batch:
        if request.samples:
            return request.samples, accumulate
        if asked.usual_samples % accumulate:
            raise ConfigError(
                f"trainer.accumulate is {accumulate}, allowed: a divisor of {asked.usual_samples},"
                " the samples of a rank in a step of a preset. Or give samples=N, of a rank in a"
                " batch."
            )
        return asked.usual_samples // accumulate, accumulate
    whole = config.data.global_batch_size
    if request.samples is None:
        if whole % (groups * accumulate):
            raise ConfigError(
                f"data.global_batch_size is {whole}, which {groups} ranks cannot share in"
                f" {accumulate} equal batches. Give a multiple of {groups * accumulate}, or"
                " another trainer.accumulate."
            )
        return whole // (groups * accumulate), accumulate
    if whole % (groups * request.samples):
        raise ConfigError(
            f"command line: samples is {request.samples}, but {groups} ranks cannot reach"
            f" data.global_batch_size={whole} with it. Give a divisor of {whole / groups:g}, or"
            " another data.global_batch_size."
        )
    batches = whole // (groups * request.samples)
    if is_given and batches != accumulate:
        raise ConfigError(
            f"command line: trainer.accumulate is {accumulate}, but samples={request.samples} needs"
            f" {batches} batches. Leave one of the two out."
        )
    return request.samples, batches


def ep_sizes_of(request: Request, config: Config, ranks: int) -> tuple[int, ...]:
    """Return the numbers of ranks that may share the experts."""
    common = math.gcd(config.moe.num_experts, ranks)
    allowed = tuple(size for size in range(1, common + 1) if common % size == 0)
    if request.ep_size is None:
        return allowed
    if request.ep_size not in allowed:
        raise ConfigError(
            f"command line: ep is {request.ep_size}, allowed:"
            f" {' | '.join(map(str, allowed))}, the divisors of {config.moe.num_experts} experts"
            f" and {ranks} ranks"
        )
    return (request.ep_size,)


def check(config: Config) -> None:
    """Raise ConfigError for a setting that the advice cannot honour."""
    if config.trainer.compile:
        raise ConfigError("advise: trainer.compile is true, allowed: false")
    if config.strategy.dense not in ("replicated", "sharded"):
        raise ConfigError(
            f"advise: strategy.dense is {config.strategy.dense}, allowed: replicated | sharded"
        )
    if config.moe.rows == "buffers":
        raise ConfigError("advise: moe.rows is buffers, allowed: auto | filled | slots")
    if config.moe.architecture not in JUDGED:
        raise ConfigError(
            f"advise: moe.architecture is {config.moe.architecture}, allowed: {' | '.join(JUDGED)}"
        )
    if config.optim.name != "adamw":
        raise ConfigError(
            f"advise: optim.name is {config.optim.name}, allowed: adamw, as no other update is"
            " simulated"
        )
