"""Estimate what a training costs, without starting it: parameters, FLOPs, bytes of All-to-All, memory of a rank.

ep ranks share one set of experts, dp such sets are replicas: ep x dp ranks, data parallel over all of them. What is not
given is as CONFIG sets it. The last line on standard output is JSON.
"""

import json
import sys

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.experiments import called, command, parser

RANKS = ("trainer.devices", "trainer.num_nodes", "strategy.ep_size")  # the fields that ep and dp set


def read(arguments: list[str]) -> tuple[Config, int, int]:
    """Return the config, checked for the given ranks, and the degrees ep and dp."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"no config given: {called('estimate')} CONFIG [ep=N] [dp=N] [key=value ...]")
    from scmoe.config.load import load
    from scmoe.config.rules import resolve_ep_size

    sizes: dict[str, int] = {}
    overrides = []
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        if key not in ("ep", "dp"):
            overrides.append(argument)
        elif not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"command line: {key} is {value!r}, allowed: a number of ranks, 1 or more")
        else:
            sizes[key] = int(value)
    for override in overrides if sizes else ():
        if (key := override.removeprefix("--").partition("=")[0]) in RANKS:
            raise ConfigError(f"command line: {key} and ep or dp, allowed: one of the two ways to set the ranks")
    if len(sizes) < 2:
        config = load(arguments[0], overrides)
        own_ep = resolve_ep_size(config)
        own = {"ep": own_ep, "dp": config.trainer.devices * config.trainer.num_nodes // own_ep}
        if not sizes:
            return config, own["ep"], own["dp"]
        sizes = own | sizes
    ranks = [f"trainer.devices={sizes['ep'] * sizes['dp']}", "trainer.num_nodes=1", f"strategy.ep_size={sizes['ep']}"]
    return load(arguments[0], [*overrides, *ranks]), sizes["ep"], sizes["dp"]


@command
def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        options = parser("estimate", __doc__)
        options.add_argument("config", metavar="CONFIG", help="a configuration, such as configs/quickstart.yaml")
        options.add_argument("words", metavar="ep=N dp=N key=value", nargs="*", help="ranks, and overrides")
        options.parse_args(["--help"])
    config, ep_size, dp_size = read(arguments)
    from scmoe.studies.estimate import estimate, estimate_table
    from scmoe.training.run.report import console

    facts = estimate(config, ep_size, dp_size)
    console().print(estimate_table(facts))
    print(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
