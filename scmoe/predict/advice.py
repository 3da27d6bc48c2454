"""The models that `scmoe advise` compares, made from one config: each architecture with as many
active weights as standard top-k.

    standard          K + 1 routed copies, where a shortcut has K and a shared expert
    shared_expert     K
    scmoe_pos1, ...   K; Pos-3 only in pairs of blocks
    top1              one copy, fewer FLOPs

A config of standard top-k has K + 1 = moe.top_k, and the others get a shared expert as wide as one
routed expert. K is moe.top_k of a config with a shared expert, which keeps its width: one that is
as wide as several routed ones counts as so many copies.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.derived import rows_are_filled, samples_of_rank
from scmoe.config.fields import Config, MoEConfig
from scmoe.config.leaves import ConfigError, key_of
from scmoe.config.load import find, load, read_unchecked
from scmoe.config.registry import IMAGES
from scmoe.loads import BALANCED, Load, check_load, load_of
from scmoe.loads import Sizes as Routed
from scmoe.moe.router import Router
from scmoe.parallel.dense.memory import RankJob, rank_memory
from scmoe.predict.advise import Advice, advise
from scmoe.predict.costs import make_batch
from scmoe.predict.operator_costs import count
from scmoe.predict.plan import Job, LoadOf, Model
from scmoe.predict.profile import Profile
from scmoe.predict.rank_shares import rank_shares
from scmoe.predict.timed_blocks import Sizes
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.assembly.rank_job import rank_job

SET_BY_REQUEST = (  # keys of a config in whose place ranks=N, ep=N, samples=N and the cluster count
    "strategy.ep_size",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "data.global_batch_size",
)
ARCHITECTURES = ("top_k", "shared_expert", "scmoe")
# of a rank in one step, where a preset of configs/model says no batch
TOKENS = 16_384
IMAGES_OF_A_RANK = 128  # Table 9: 1,024 on eight ranks
BATCHES = (1, 2, 4, 8, 16)  # into which these are divided where the device has too little memory


@dataclass(frozen=True)
class Request:
    """A job to be judged. ranks, ep_size, samples: None: all of the cluster, the largest number
    that divides ranks and experts, and those of a rank in the config."""

    config: str
    overrides: Sequence[str] = ()
    ranks: int | None = None
    ep_size: int | None = None
    samples: int | None = None
    load: str = BALANCED


def advice_for(request: Request, profile: Profile) -> tuple[Advice, Config]:
    """Return the advice, and the config with the ranks and the batch for which it is."""
    config, models = job_that_fits(request, profile)
    return advise(models, profile, job_of(config), models[0].name), config


def job_that_fits(request: Request, profile: Profile) -> tuple[Config, list[Model]]:
    """Return the config and its counted architectures. The step of a preset, which says no batch,
    is in as few batches as fit the device in one chunk and with one batch in flight; in one, if
    none of these does. More chunks and two batches in flight may need more memory."""
    first: tuple[Config, list[Model]] | None = None
    for each in requests_of(request):
        config = config_for(each, profile)
        models = models_for(each, profile, config)
        most = profile.memory
        if most is None or all(model.memory(1, 1) <= most for model in models):
            return config, models
        first = first or (config, models)
    assert first is not None  # the request itself is the first one
    return first


def requests_of(request: Request) -> Iterator[Request]:
    """Yield the request; for a preset, if neither samples nor trainer.accumulate are given, also
    with its step in more batches."""
    path = find(request.config)
    given = {key_of(word) for word in request.overrides}
    yield request
    if path.parent.name != "model" or request.samples or "trainer.accumulate" in given:
        return
    samples = samples_of(read_unchecked(path, request.overrides), path)
    for batches in BATCHES[1:]:
        if samples % batches == 0:
            words = [*request.overrides, f"trainer.accumulate={batches}"]
            yield replace(request, samples=samples // batches, overrides=words)


def config_for(request: Request, profile: Profile) -> Config:
    """Return the config on the ranks of the cluster. ConfigError: it cannot run there."""
    ranks = request.ranks or profile.ranks
    if ranks > profile.ranks:
        raise ConfigError(
            f"command line: ranks is {ranks}, allowed: up to {profile.ranks}, those of cluster"
            f" {profile.name}"
        )
    path = find(request.config)
    given = {key_of(word) for word in request.overrides}
    for key in SET_BY_REQUEST:
        if key in given:
            raise ConfigError(
                f"command line: {key} is given, but ranks=N, ep=N, samples=N and the cluster set"
                " it. Give those alone."
            )
    if "schedule.batches_in_flight" in given:
        raise ConfigError(
            "command line: schedule.batches_in_flight is given, but advise compares one and two"
            " batches in flight. Leave it out."
        )
    precision = f"trainer.precision={profile.precision}"
    if "trainer.precision" in given and precision not in request.overrides:
        raise ConfigError(
            f"command line: trainer.precision is given, but the rates of cluster {profile.name} are"
            f" those of {profile.precision}. Leave it out, or write a profile of another precision"
        )
    accelerator = "cpu" if profile.precision == "32-true" else "gpu"
    first = read_unchecked(path, request.overrides)
    check(first)
    samples = request.samples or samples_of(first, path)
    ep_size = request.ep_size or math.gcd(first.moe.num_experts, ranks)
    node = min(ranks, profile.ranks_per_node)
    words = [
        precision,
        f"trainer.accelerator={accelerator}",
        f"trainer.devices={node}",
        f"trainer.num_nodes={max(1, ranks // node)}",
        f"strategy.ep_size={ep_size}",
        f"data.global_batch_size={ranks * samples * max(1, first.trainer.accumulate)}",
        "schedule.batches_in_flight=null",  # one and two are compared
    ]
    if ranks % node:
        raise ConfigError(
            f"command line: ranks is {ranks}, allowed: multiples of {node}, the ranks of a node"
        )
    return load(path, [*request.overrides, *words])


def samples_of(config: Config, path: Path) -> int:
    """Return the samples of a rank in one batch: those of the config, but a preset has none.

    config: not checked yet."""
    if path.parent.name != "model":
        return max(1, samples_of_rank(config))
    if config.data.name in IMAGES or config.model.family == "swin":
        return IMAGES_OF_A_RANK
    return max(1, TOKENS // config.data.seq_len)


def check(config: Config) -> None:
    """Raise ConfigError for a setting that the advice cannot honour."""
    if config.trainer.compile:
        raise ConfigError("advise: trainer.compile is true, allowed: false")
    if config.strategy.dense != "replicated":
        raise ConfigError(
            f"advise: strategy.dense is {config.strategy.dense}, allowed: replicated, as sums of"
            " split weights are not simulated"
        )
    if config.moe.rows == "buffers":
        raise ConfigError("advise: moe.rows is buffers, allowed: auto | filled | slots")
    if config.moe.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"advise: moe.architecture is {config.moe.architecture}, allowed:"
            f" {' | '.join(ARCHITECTURES)}"
        )
    if config.optim.name != "adamw":
        raise ConfigError(
            f"advise: optim.name is {config.optim.name}, allowed: adamw, as no other update is"
            " simulated"
        )


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
    if moe.every == 2:
        yield "scmoe_pos3", replace(shortcut, position="pos3")


def models_for(request: Request, profile: Profile, config: Config) -> list[Model]:
    """Return every architecture of the config, counted, the standard one first."""
    ffn_dim = config.model.ffn_dim or 4 * config.model.dim
    routing = load_of(request.load)
    return [
        model_of(name, replace(config, moe=moe), profile, routing, shared_width(config))
        for name, moe in architectures(config.moe, ffn_dim)
    ]


def shared_width(config: Config) -> int | None:
    """Return the hidden width that shared experts get; None: they keep the config's."""
    return config.moe.ffn_dim if config.moe.architecture == "top_k" else None


def job_of(config: Config) -> Job:
    """Return what all rows share."""
    training = rank_job(config)
    wire = training.wire_bytes or training.compute_bytes
    sizes = Sizes(training.ranks, training.ep_size, sent=wire / training.compute_bytes)
    return Job(sizes, training.accumulate, two=training.samples > 1)


def model_of(
    name: str, config: Config, profile: Profile, routing: Load, shared_dim: int | None
) -> Model:
    """Return the architecture of a config, counted. shared_dim: hidden width of its shared experts,
    if it is not the config's."""
    moe = config.moe
    schedule = replace(config.schedule, auto=False, slot=None, chunks=None, inside_attention=False)
    usual = replace(config, schedule=replace(schedule, batches_in_flight=None))
    training = rank_job(usual)
    slots = (
        moe.capacity_factor if rows_are_padded(config) else None
    )  # that travel, over fair shares
    whole = build_on_meta(usual, shared_dim)
    routers = [block.moe.router for block in moe_blocks_of(whole)]
    loads = loads_of(routing, routers, training, pads=slots is not None)
    in_slots = slots is not None and profile.padding is None
    factor = profile.padding or slots or 1.0
    busiest_rows = factor / (slots or 1.0) * most_rows(loads, routers)
    counted = replace(usual, moe=replace(moe, capacity_factor=factor, rows="slots"))
    batch = next(iter(make_batch(counted, training.samples).values()))
    model = build_on_meta(counted, shared_dim)
    costs = count(model, training, batch, 1 if in_slots else batches_of_even_rows(model, training))
    names = {block.schedule.architecture: block.schedule for block in moe_blocks_of(model)}
    memory = memory_of(whole, moe.architecture, replace(training, busiest_rows=busiest_rows))
    return Model(name, costs, names[moe.architecture], memory, loads)


def memory_of(model: Any, architecture: str, training: RankJob) -> Callable[[int, int], float]:
    """Return a function that returns the bytes of a rank at most, in so many chunks and batches in
    flight. Blocks of another architecture keep their chunks."""
    blocks = [b for b in moe_blocks_of(model) if b.schedule.architecture == architecture]

    @cache
    def memory(chunks: int, batches_in_flight: int) -> float:
        for block in blocks:
            block.run_as(replace(block.schedule, chunks=chunks), block.moe.dispatcher)
        return rank_memory(model, replace(training, batches_in_flight=batches_in_flight))["total"]

    return memory


def most_rows(loads: LoadOf | None, routers: Sequence[Router]) -> float:
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
    routing: Load, routers: Sequence[Router], training: RankJob, pads: bool
) -> LoadOf | None:
    """Return the loads of a model's rows; None: even ones. routers: of its blocks. pads: every slot
    travels, filled or not. ConfigError: the load cannot be dealt, or changes nothing."""
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
    each = [Routed(router.num_experts, router.top_k, training.ep_size) for router in routers]
    for sizes in dict.fromkeys(each):
        check_load(routing, sizes, training.samples)
    return rank_shares(routing, each[0])


def rows_are_padded(config: Config) -> bool:
    """Return whether every slot of the capacity travels, filled or not."""
    return config.moe.rows != "buffers" and not rows_are_filled(config)
