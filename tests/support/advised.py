"""The models that `scmoe advise` compares, counted once for several tests."""

from collections.abc import Mapping
from functools import cache

from scmoe.loads import load_of
from scmoe.predict.asked_config import read_asked
from scmoe.predict.cluster import Profile, read_profile
from scmoe.predict.compared_models import Model, architectures, counted_model, ffn_dim_of, job_of
from scmoe.predict.judged_job import Job, Request

# four samples of each of eight ranks
QUICK_WORDS = ("model.layers=4", "data.global_batch_size=32")
QUICK = Request(read_asked("quickstart", QUICK_WORDS))


def counted_on(profile: Profile, request: Request, *names: str) -> tuple[Job, dict[str, Model]]:
    """Return the job of a request, and its models by name, as `models_for` makes them. names: of
    those that are counted; none: all, top1 among them."""
    job = job_of(request, profile)
    load = load_of(request.load)
    return job, {
        name: counted_model(name, moe, job, profile, load)
        for name, moe in architectures(job.config.moe, ffn_dim_of(job.config))
        if not names or name in names
    }


@cache
def quickstart_on_cards() -> tuple[Profile, Job, Mapping[str, Model]]:
    """Return a cluster of eight H100 cards, the quickstart's job there, and its models."""
    profile = read_profile("8xH100")
    return profile, *counted_on(profile, QUICK)
