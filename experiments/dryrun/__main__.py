"""`scmoe dryrun` runs one training step of rank 0 of a large job in this process, on tensors without numbers."""

import json
import sys
from collections.abc import Sequence

from scmoe.config.leaves import ConfigError
from scmoe.experiments.engine.command_line import KeyValue, call


def read(words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Return ranks and samples, and the other words."""
    sizes, overrides = dict[str, int](), list[str]()
    for word in words:
        key, _, value = word.partition("=")
        if key not in ("ranks", "samples"):
            overrides.append(word)
        elif not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"command line: {key} is {value!r}, allowed: a number, 1 or more")
        else:
            sizes[key] = int(value)
    if "ranks" not in sizes and sizes:
        raise ConfigError("command line: samples without ranks, allowed: both, or data.global_batch_size alone")
    return sizes, overrides


def main(config: str, /, *words: KeyValue) -> None:
    """Run one training step of rank 0 of a large job in this process, on tensors without numbers, and count.

    Standard output is JSON.

    Args:
        config: a YAML file or the name of a shipped one; or presets, which runs every preset in each layout of dense
            weights, in two precisions, with recompute or not
        words: ranks=N for the number of ranks, on nodes of 8 or of trainer.devices=N (default: as CONFIG sets them),
            samples=N for the samples of a rank in a batch (default: 1), and key=value
    """
    sizes, overrides = read(words)
    from scmoe.config.load import load
    from scmoe.experiments.dryrun.dry_runs import compare, dry_run_table, load_for, preset_rows, with_slots
    from scmoe.training.run.printout import console

    ranks, samples = sizes.get("ranks"), sizes.get("samples", 1)
    if config == "presets":
        rows = []
        for row in preset_rows(ranks or 64, samples, overrides):
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            console().print(" ".join(cells))
            rows.append(row)
        return print(json.dumps(rows))
    given = load(config, overrides) if ranks is None else load_for(config, ranks, samples, overrides)
    settings = with_slots(given)
    if settings != given:
        print("moe.rows=slots is set: a dry run has no data, so it counts every slot of the capacity", file=sys.stderr)
    world = settings.trainer.devices * settings.trainer.num_nodes
    print(f"one step of rank 0 of {world:,} ranks is run on tensors without numbers", file=sys.stderr, flush=True)
    run, facts = compare(settings)
    console().print(dry_run_table(run, facts, f"dry run of rank 0 of {world}, dense weights {settings.strategy.dense}"))
    print(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(call("dryrun", *sys.argv[1:]))
