"""The models that `scmoe advise` compares, counted once for several tests."""

from functools import cache

from scmoe.config.fields import Config
from scmoe.predict.advice import Request, config_for, models_for
from scmoe.predict.plan import Model
from scmoe.predict.profile import Profile, read_profile

QUICK = Request("quickstart", ["model.layers=4"])


@cache
def quickstart_on_cards() -> tuple[Profile, Config, dict[str, Model]]:
    """Return a cluster of eight H100 cards, the quickstart's config there, and its models."""
    profile = read_profile("8xH100")
    config = config_for(QUICK, profile)
    return profile, config, {model.name: model for model in models_for(QUICK, profile, config)}
