"""The models that `scmoe advise` compares, counted once for several tests."""

from collections.abc import Mapping
from functools import cache

from scmoe.predict.asked_config import read_asked
from scmoe.predict.cluster import Profile, read_profile
from scmoe.predict.compared_models import Model, job_of, models_for
from scmoe.predict.judged_job import Job, Request

# four samples of each of eight ranks
QUICK_WORDS = ("model.layers=4", "data.global_batch_size=32")
QUICK = Request(read_asked("quickstart", QUICK_WORDS))


def counted_on(profile: Profile, request: Request) -> tuple[Job, dict[str, Model]]:
    """Return the job of a request, and its models by name, top1 among them."""
    job = job_of(request, profile)
    models = models_for(job, profile, request.load, top1=True)
    return job, {model.name: model for model in models}


@cache
def quickstart_on_cards() -> tuple[Profile, Job, Mapping[str, Model]]:
    """Return a cluster of eight H100 cards, the quickstart's job there, and its models."""
    profile = read_profile("8xH100")
    return profile, *counted_on(profile, QUICK)
