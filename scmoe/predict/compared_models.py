"""The models that `scmoe advise` compares: one config in each architecture, with as many active
weights as standard top-k.

    standard          K + 1 routed copies, where a shortcut has K and a shared expert
    shared_expert     K
    scmoe_pos1, ...   K; Pos-3 not with an MoE in every block
    farskip           K; only with an MoE in every block
    top1              one copy, fewer FLOPs; only if it is asked for

A config of standard top-k has K + 1 = moe.top_k, and the others get a shared expert as wide as one
routed expert. K is moe.top_k of a config with a shared expert, which keeps its width: one that is
as wide as several routed ones counts as so many copies.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

from torch import nn

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.derived import rows_are_filled
from scmoe.config.fields import Config, MoEConfig
from scmoe.config.leaves import ConfigError
from scmoe.config.model_fields import ScheduleConfig
from scmoe.loads import BALANCED, Load, Sizes, check_load, counts_of, load_of
from scmoe.models.model_cost import forward_flops
from scmoe.moe.router import Router
from scmoe.parallel.dense.memory import RankJob, rank_memory
from scmoe.predict.batches import InFlight
from scmoe.predict.cluster import Profile
from scmoe.predict.costs import make_batch
from scmoe.predict.judged_job import Job, Request, job_in_batches, smaller_requests
from scmoe.predict.operator_costs import Costs, count
from scmoe.schedule.play import Load as PlayedLoad
from scmoe.schedule.play import shares
from scmoe.schedule.schedule import Schedule
from scmoe.training.assembly.model import build_model_on_meta

# of a load, at most; those of a recording are spread over all of it
PLAYED_STEPS = 8
DEALT = 2048  # tokens of a rank that are dealt: shares do not depend on their number

Loads = Callable[[int, int | None], Sequence[PlayedLoad]]
"""Returns the load of each of a number of steps, in so many chunks. The second number is the
block's top-k; None: that of the model's architecture."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model to be compared. name: of its architecture. schedule: of the blocks that have it.
    flops: of one sample's forward pass, without empty slots. memory: returns the bytes of a rank at
    most, with so many ranks that share the experts, in so many chunks and with these batches in
    flight. loads: of its rows with so many ranks that share the experts; None: even."""

    name: str
    costs: Costs
    schedule: Schedule
    flops: float
    memory: Callable[[int, int, InFlight], float]
    loads: Callable[[int], Loads | None]


def job_of(request: Request, profile: Profile) -> Job:
    """Return the job on the ranks of the cluster. ConfigError: it cannot run there.

    The step of a preset, which says no batch, is in as few batches as fit the device with the
    standard model, one chunk and one batch in flight; in one, if none of these does."""
    first = job_in_batches(request, profile)
    smaller = [*smaller_requests(request)]
    most = profile.memory
    if most is None or not first.knows_memory or not smaller:
        return first
    standard = standard_of(first.config)
    memory = memory_of(build_on_meta(standard, None), "top_k", first.training)
    for job in chain([first], (job_in_batches(each, profile) for each in smaller)):
        if min(memory(ep_size, 1, 1, job.samples) for ep_size in job.ep_sizes) <= most:
            return job
    return first


def models_for(job: Job, profile: Profile, load: str, top1: bool = False) -> list[Model]:
    """Return every architecture of the job, counted, the standard one first. load: of the experts.
    top1: whether it is compared."""
    routing = load_of(load)
    return [
        counted_model(name, moe, job, profile, routing)
        for name, moe in architectures(job.config.moe, ffn_dim_of(job.config))
        if name != "top1" or top1
    ]


def architectures(moe: MoEConfig, ffn_dim: int) -> Iterator[tuple[str, MoEConfig]]:
    """Yield the architectures to be compared, the standard one first. ffn_dim: of a shared expert
    that the config has. ConfigError: there are none with as many active weights."""
    is_standard = moe.architecture == "top_k"
    copies = 1 if is_standard else max(1, round(ffn_dim / (moe.ffn_dim or ffn_dim)))
    # of the routed copies of a router with zero experts, a part computes nothing
    copies = round(copies * (moe.num_experts + moe.zero_experts) / moe.num_experts)
    standard_k = moe.top_k if is_standard else moe.top_k + copies
    k = moe.top_k - copies if is_standard else moe.top_k
    if k < 1:
        raise ConfigError(
            f"advise: moe.top_k is {moe.top_k}, and a shared expert counts as {copies} of its"
            " copies, so a shortcut would have more active weights. Use a larger moe.top_k."
        )
    if standard_k > moe.num_experts:
        raise ConfigError(
            f"advise: moe.num_experts is {moe.num_experts}, but standard top-k of as many active"
            f" weights routes {standard_k} copies. Use more experts."
        )
    plain = replace(moe, first_position=None, coefficient_input="current", tap_norm="own")
    top_k = replace(plain, architecture="top_k", top_k=standard_k)
    yield f"top{standard_k}", top_k
    if standard_k > 1:
        yield "top1", replace(top_k, top_k=1)
    yield "shared_expert", replace(plain, architecture="shared_expert", top_k=k)
    shortcut = replace(plain, architecture="scmoe", top_k=k)
    yield "scmoe_pos1", replace(shortcut, position="pos1")
    yield "scmoe_pos2", replace(shortcut, position="pos2")
    if moe.every == 1:
        yield "farskip", replace(plain, architecture="farskip", top_k=k)
    else:
        yield "scmoe_pos3", replace(shortcut, position="pos3")


def standard_of(config: Config) -> Config:
    """Return the config with the standard model."""
    _, moe = next(iter(architectures(config.moe, ffn_dim_of(config))))
    return replace(config, moe=moe)


def ffn_dim_of(config: Config) -> int:
    return config.model.ffn_dim or 4 * config.model.dim


def shared_width(config: Config) -> int | None:
    """Return the hidden width that shared experts get; None: they keep the config's."""
    return config.moe.ffn_dim if config.moe.architecture == "top_k" else None


# ---------------------------------------------------------------------- counting a model


def counted_model(name: str, moe: MoEConfig, job: Job, profile: Profile, routing: Load) -> Model:
    """Return an architecture of a job, counted. moe: its section of the config."""
    usual = replace(job.config, moe=moe, schedule=ScheduleConfig())
    shared_dim = shared_width(job.config)
    training = job.training
    sizes = job.sizes
    # of the slots that travel, over fair shares
    slots = moe.capacity_factor if rows_are_padded(usual) else None
    full_model = build_on_meta(usual, shared_dim)
    routers = [block.moe.router for block in moe_blocks_of(full_model)]

    @cache
    def loads(ep_size: int) -> Loads | None:
        return loads_of(routing, routers, ep_size, training.samples, pads=slots is not None)

    in_slots = slots is not None and profile.padding is None
    factor = profile.padding or slots or 1.0
    counted = replace(usual, moe=replace(moe, capacity_factor=factor, rows="slots"))
    batch = next(iter(make_batch(counted, training.samples).values()))
    model = build_on_meta(counted, shared_dim)
    costs = count(model, training, batch, 1 if in_slots else batches_of_even_rows(model, training))
    names = {block.schedule.architecture: block.schedule for block in moe_blocks_of(model)}
    of_architecture = memory_of(full_model, moe.architecture, training)

    @cache
    def memory(ep_size: int, chunks: int, batches: InFlight) -> float:
        busiest_rows = factor / (slots or 1.0) * most_rows(loads(ep_size), routers)
        # two whole batches need as much as one that is twice as large in two parts
        samples = training.samples * batches.held
        return of_architecture(ep_size, chunks, batches.number, samples, busiest_rows)

    by_kind = forward_flops(full_model, training.seq_len, empty_slots=False)
    head = by_kind.pop("head", 0.0)
    # of a stage on average: the last one has the head, and may lack layers
    flops = head / sizes.stages + sum(by_kind.values()) * (1 - sizes.missing / sizes.stages)
    return Model(name, costs, names[moe.architecture], flops, memory, loads)


def memory_of(model: Any, architecture: str, training: RankJob) -> Callable[..., float]:
    """Return a function that returns the bytes of a rank at most, with so many ranks that share the
    experts, in so many chunks, and with a batch of so many samples in so many parts. Blocks of
    another architecture keep their chunks."""
    blocks = [b for b in moe_blocks_of(model) if b.schedule.architecture == architecture]

    def memory(
        ep_size: int, chunks: int, parts: int, samples: int, busiest_rows: float = 1.0
    ) -> float:
        for block in blocks:
            block.run_as(replace(block.schedule, chunks=chunks), block.moe.dispatcher)
        job = replace(
            training, ep_size=ep_size, parts=parts, samples=samples, busiest_rows=busiest_rows
        )
        return rank_memory(model, job)["total"]

    return memory


def most_rows(loads: Loads | None, routers: Sequence[Router]) -> float:
    """Return the rows of the busiest rank's experts, over those of an even load; at the most uneven
    block and step."""
    if loads is None:
        return 1.0
    steps = [step for router in routers for step in loads(1, router.top_k)]
    return max(share.computed for step in steps for chunk in step for share in chunk)


def build_on_meta(config: Config, shared_dim: int | None) -> Any:
    """Return the model of a config, with shared experts of this hidden width; None: the
    config's."""
    model = build_model_on_meta(config)
    for block in moe_blocks_of(model):
        shared: Any = block.shared_expert
        if shared is not None and shared_dim is not None:
            has_bias = shared.w_in.bias is not None
            widened = shared.act.widening * shared_dim
            shared.w_in = nn.Linear(shared.dim, widened, has_bias, device="meta")
            shared.w_out = nn.Linear(shared_dim, shared.dim, has_bias, device="meta")
    return model


def batches_of_even_rows(model: Any, training: RankJob) -> int:
    """Return the fewest batches of a rank that give all experts equally many rows."""
    rows = model.rows_per_sample(training.seq_len)
    needed = 1
    for block in moe_blocks_of(model):
        experts = block.moe.router.num_experts
        tokens = round(training.samples * rows[block.moe])
        needed = math.lcm(needed, experts // math.gcd(tokens, experts))
    return needed


def loads_of(
    routing: Load, routers: Sequence[Router], ep_size: int, samples: int, pads: bool
) -> Loads | None:
    """Return the loads of a model's rows; None: even ones, or no rows travel. routers: of its
    blocks. pads: every slot travels, filled or not. ConfigError: the load cannot be dealt, or
    changes nothing."""
    if routing.kind == BALANCED:
        return None
    if pads:
        raise ConfigError(
            f"load is {routing.name}, but every slot of moe.capacity_factor travels, filled or"
            " not, so a load changes nothing. Add moe.capacity_factor=null."
        )
    if routing.kind == "ragged":
        raise ConfigError(
            f"load is {routing.name}, but all ranks have equal batches. Give another kind of load."
        )
    if ep_size == 1:
        return None
    each = [Sizes(router.num_experts, router.top_k, ep_size) for router in routers]
    try:
        for sizes in dict.fromkeys(each):
            check_load(routing, sizes, samples)
    except ConfigError as error:
        raise ConfigError(f"{error}. To try another EP alone, give ep=N") from error
    return rank_shares(routing, each[0])


def rank_shares(routing: Load, sizes: Sizes) -> Loads | None:
    """Return the load of each of a number of steps, in so many chunks; None: no rows travel.

    sizes: their top_k counts where a caller asks for no other one.
    """
    if sizes.ranks == 1:
        return None

    @cache
    def in_chunks(chunks: int, top_k: int | None = None) -> Sequence[PlayedLoad]:
        routed = sizes._replace(top_k=top_k or sizes.top_k)
        loads = []
        for step in range(min(PLAYED_STEPS, routing.phases(sizes.ranks))):
            counts_PRE = counts_of(routing, routed, [DEALT] * sizes.ranks, step, chunks)
            rows_PRR = counts_PRE.unflatten(2, (sizes.ranks, -1)).sum(3).tolist()
            loads.append([shares(rows_RR) for rows_RR in rows_PRR])
        return loads

    return in_chunks


def rows_are_padded(config: Config) -> bool:
    """Return whether every slot of the capacity travels, filled or not."""
    return config.moe.rows != "buffers" and not rows_are_filled(config)
