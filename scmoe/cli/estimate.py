import json
from collections.abc import Sequence

from scmoe.command_line import KeyValue, numbers_of
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError

RANKS = (
    "trainer.devices",
    "trainer.num_nodes",
    "strategy.ep_size",
)  # the fields that ep and dp set


def read(path: str, words: Sequence[str]) -> Config:
    """Return the config, checked for the given ranks."""
    from scmoe.config.load import load
    from scmoe.config.rules import resolve_ep_size

    sizes, overrides = numbers_of(words, ("ep", "dp"))
    if not sizes:
        return load(path, overrides)
    for override in overrides:
        if (key := override.removeprefix("--").partition("=")[0]) in RANKS:
            raise ConfigError(
                f"command line: {key} and ep or dp, allowed: one of the two ways to set the ranks"
            )
    if len(sizes) < 2:
        # other ranks come below, and the file's may have no rows to send
        no_rows = (
            "strategy.wire_dtype=null",
            "schedule.batches_in_flight=null",
            "schedule.transfers=overlapped",
        )
        config = load(path, [*overrides, *no_rows])
        own_ep = resolve_ep_size(config)
        own = {"ep": own_ep, "dp": config.trainer.devices * config.trainer.num_nodes // own_ep}
        sizes = own | sizes
    ranks = [
        f"trainer.devices={sizes['ep'] * sizes['dp']}",
        "trainer.num_nodes=1",
        f"strategy.ep_size={sizes['ep']}",
    ]
    return load(path, [*overrides, *ranks])


def main(config: str, /, *words: KeyValue) -> None:
    """Estimate what a training costs, without starting it: parameters, FLOPs, bytes of All-to-All,
    memory of a rank.

    ep ranks share one set of experts, dp such sets are replicas: ep x dp ranks, data parallel over
    all of them. What is not given is as CONFIG sets it. Standard output is JSON; `total` of its
    memory_bytes is an upper bound.

    Args:
        config: a YAML file, such as configs/quickstart.yaml, or the name of a shipped one
        words: ep=N and dp=N for the ranks, and key=value
    """
    settings = read(config, words)
    from scmoe.estimate.estimated import estimate, estimate_table
    from scmoe.training.run.printout import console

    facts = estimate(settings)
    console().print(estimate_table(facts))
    print(json.dumps(facts))
