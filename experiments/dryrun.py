"""Run one training step of rank 0 of a large job in this process, on tensors without numbers, and count.

ranks=N sets the number of ranks, on nodes of 8 or of trainer.devices=N; samples=N the samples of a rank in a batch
(default 1). Without ranks, they are as CONFIG sets them. `presets` in place of CONFIG runs every preset in each layout
of dense weights, two precisions, with recompute or not. The last line on standard output is JSON.
"""

import json
import sys

from scmoe.config.leaves import ConfigError
from scmoe.experiments import called, command, parser


def read(arguments: list[str]) -> tuple[dict[str, int], list[str]]:
    """Return ranks and samples, and the other words."""
    sizes, overrides = dict[str, int](), list[str]()
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in ("ranks", "samples"):
            overrides.append(argument)
        elif not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"command line: {key} is {value!r}, allowed: a number, 1 or more")
        else:
            sizes[key] = int(value)
    if "ranks" not in sizes and sizes:
        raise ConfigError("command line: samples without ranks, allowed: both, or data.global_batch_size alone")
    return sizes, overrides


@command
def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        options = parser("dryrun", __doc__)
        options.add_argument("config", metavar="CONFIG", help="a configuration, or presets for all of configs/model")
        options.add_argument("words", metavar="ranks=N samples=N key=value", nargs="*", help="ranks, and overrides")
        options.parse_args(["--help"])
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"no config given: {called('dryrun')} CONFIG [ranks=N] [samples=N] [key=value ...]")
    sizes, overrides = read(arguments[1:])
    from scmoe.config.load import load
    from scmoe.studies.dry_run import compare, dry_run_table, load_for, preset_rows
    from scmoe.training.run.report import console

    ranks, samples = sizes.get("ranks"), sizes.get("samples", 1)
    if arguments[0] == "presets":
        rows = []
        for row in preset_rows(ranks or 64, samples, overrides):
            console().print(
                " ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            )
            rows.append(row)
        print(json.dumps(rows))
        return
    source = arguments[0]
    config = load(source, overrides) if ranks is None else load_for(source, ranks, samples, overrides)
    run, facts = compare(config)
    world = config.trainer.devices * config.trainer.num_nodes
    console().print(dry_run_table(run, facts, f"dry run of rank 0 of {world}, dense weights {config.strategy.dense}"))
    print(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
