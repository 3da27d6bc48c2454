"""The curves of `scmoe advise --curves`: over bandwidth, EP, width, tokens of a rank, and load."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from scmoe.config.extras import require
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.files import warn_once
from scmoe.loads import BALANCED, Load, Sizes, check_load, load_of
from scmoe.predict.advice import Request, config_for, job_of, models_for, rows_are_padded
from scmoe.predict.advise import tier_of
from scmoe.predict.curves import Curve, Point, basis, draw, is_measured, point
from scmoe.predict.plan import SHARED, Job, Model
from scmoe.predict.profile import Profile
from scmoe.predict.rank_shares import rank_shares

BANDWIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # over the profile's
TOKENS = (1 / 64, 1 / 16, 1 / 4, 1, 4)  # over the job's
WIDTHS = (1 / 2, 1, 2)  # over the model's
LOADS = (1.0, 1.3, 1.7, 2.0)  # rows of the busiest rank over the mean


def draw_curves(request: Request, profile: Profile, folder: Path) -> Iterator[Path]:
    """Draw all curves into a folder, and yield their files. There is none over load where every
    slot of a capacity travels, filled or not. ConfigError: matplotlib is not installed."""
    require("scmoe advise --curves", "matplotlib")
    profile = replace(profile, memory_gb=None)  # a row's memory is known at the job's sizes alone
    config = config_for(request, profile)
    models = compared(models_for(request, profile, config))
    for curve in curves(request, profile, config, models):
        path = folder / f"{curve.name}.png"
        words = f"{models[-1].name}, {Path(request.config).stem} on {profile.name}"
        draw(curve, f"{words}\nPrediction; {basis(curve.points, profile)}", path)
        yield path


def compared(models: Sequence[Model]) -> list[Model]:
    """Return the standard model, shared-expert, and Pos-2."""
    return [model for model in models if model.name in (models[0].name, SHARED, "scmoe_pos2")]


def curves(
    request: Request, profile: Profile, config: Config, models: Sequence[Model]
) -> Iterator[Curve]:
    job = job_of(config)
    shortcut = models[-1].name

    def at(
        x: float, profile: Profile = profile, job: Job = job, models: Sequence[Model] = models
    ) -> Point:
        return point(x, models, profile, job, shortcut)

    key = f"links.{tier_of(models[0], profile.machine(), job.sizes)}.gb_s"
    rate = profile.values[key].value
    over_rates = [at(rate * f, profile.with_values({key: rate * f})) for f in BANDWIDTHS]
    at_own = is_measured(models, profile, job)  # a rate that is given has no source
    yield Curve(
        "bandwidth",
        f"{key}, 10^9 B/s of a rank in one direction",
        [each._replace(is_measured=at_own and each.x == rate) for each in over_rates],
    )
    sizes = job.sizes
    powers = [2**i for i in range(1, 12)]
    degrees = [n for n in powers if config.moe.num_experts % n == 0 and sizes.ranks % n == 0]
    over_degrees = [
        at(n, job=replace(job, sizes=sizes._replace(ep_size=n)), models=loaded)
        for n, loaded in of_degrees(request, config, models, degrees)
    ]
    if len(over_degrees) > 1:
        yield Curve("ep", "EP: ranks that share the experts", over_degrees)
    tokens = models[0].costs.tokens * job.accumulate
    yield Curve(
        "tokens",
        "tokens of a rank in a step",
        [at(tokens * f, job=replace(job, sizes=sizes._replace(rows=f))) for f in TOKENS],
    )
    yield Curve(
        "width",
        "width of the model",
        [at(config.model.dim * f, models=wide) for f, wide in of_widths(request, profile, models)],
    )
    is_padded = rows_are_padded(config) and config.moe.capacity_factor is not None
    if sizes.ep_size > 1 and not is_padded:
        yield over_load(at, models, config, sizes.ep_size)


def over_load(
    at: Callable[..., Point], models: Sequence[Model], config: Config, ranks: int
) -> Curve:
    """Return the curve over the load of the busiest rank."""
    points = []
    for heat in LOADS:
        if heat > min(ranks, config.moe.num_experts / models[0].costs.top_k):
            continue
        name = BALANCED if heat == 1 else f"hot_rank:{heat}"
        loaded = under_load(load_of(name), models, config, ranks)
        points.append(at(heat, models=loaded))
    return Curve("load", "rows of the busiest rank over the mean", points, logarithmic=False)


def under_load(load: Load, models: Sequence[Model], config: Config, ranks: int) -> list[Model]:
    """Return the models at a load, with so many ranks that share the experts. ConfigError: it
    cannot be dealt."""
    loaded = []
    for model in models:
        sizes = Sizes(config.moe.num_experts, model.costs.top_k, ranks)
        check_load(load, sizes, sequences=1)
        is_even = load.kind == BALANCED
        loaded.append(replace(model, loads=None if is_even else rank_shares(load, sizes)))
    return loaded


def of_degrees(
    request: Request, config: Config, models: Sequence[Model], degrees: Sequence[int]
) -> Iterator[tuple[int, Sequence[Model]]]:
    """Yield the models at each EP on which the load can be dealt."""
    load = load_of(request.load)
    for ranks in degrees:
        try:
            yield ranks, under_load(load, models, config, ranks)
        except ConfigError as error:
            warn_once(f"no point at EP {ranks}: {error}")


def of_widths(
    request: Request, profile: Profile, models: Sequence[Model]
) -> Iterator[tuple[float, Sequence[Model]]]:
    """Yield the models at each width that the config can have."""
    for factor in WIDTHS:
        try:
            yield factor, models if factor == 1 else wider(request, profile, factor)
        except ConfigError as error:
            warn_once(f"no point at {factor:g} times the width: {error}")


def wider(request: Request, profile: Profile, factor: float) -> list[Model]:
    """Return the models at another width."""
    config = config_for(request, profile)
    words = [f"model.dim={round(config.model.dim * factor)}"]
    if config.model.ffn_dim is not None:
        words.append(f"model.ffn_dim={round(config.model.ffn_dim * factor)}")
    if config.model.head_dim is not None:
        words.append(f"model.head_dim={round(config.model.head_dim * factor)}")
    if config.moe.ffn_dim is not None:
        words.append(f"moe.ffn_dim={round(config.moe.ffn_dim * factor)}")
    other = replace(request, overrides=[*request.overrides, *words])
    return compared(models_for(other, profile, config_for(other, profile)))
