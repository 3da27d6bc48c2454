"""`scmoe dryrun` runs one training step of rank 0 of a large job in this process, on tensors
without numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from scmoe.command_line import KeyValue, numbers_of
from scmoe.config.leaves import ConfigError, four_digits
from scmoe.parallel.container_memory import GIB
from scmoe.report import print_result

# The columns of the table for presets, beside PRECISIONS and RECOMPUTE.
MODES = ("replicated", "sharded")
PRECISIONS = ("32-true", "bf16-mixed")
RECOMPUTE = ("false", "true")


def facts_of(run: Any) -> dict[str, Any]:
    """Return what the command prints of a DryRun."""
    return {
        "peak_gib": sum(run.peak.values()) / GIB,
        "states_gib": (run.weights + run.gradients + run.optimizer) / GIB,
        "flops": run.flops,
        "collectives": run.collectives,
    }


def numbers(run: Any) -> dict[str, float]:
    """Return what the table of a DryRun shows, by the names of its lines."""
    return {
        **{
            f"GiB of {name}": getattr(run, name) / GIB
            for name in ("weights", "gradients", "optimizer")
        },
        **{f"GiB at the peak, made in {phase}": size / GIB for phase, size in run.peak.items()},
        "GiB at the peak": sum(run.peak.values()) / GIB,
        "TFLOPs of a step": run.flops / 1e12,
        **{f"MiB of a step: {name}": size / 2**20 for name, size in run.collectives.items()},
    }


def preset_rows(ranks: int, samples: int, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a dry run of every preset with each layout of dense weights, in two precisions, with
    recompute or not.

    Presets without a capacity have one of 1 here, which is all rows of balanced routing."""
    from scmoe.config.load import SHIPPED
    from scmoe.predict.costs import dry_run, load_for, with_slots

    presets = sorted((SHIPPED / "model").glob("*.yaml"))
    for path, dense, precision, recompute in product(presets, MODES, PRECISIONS, RECOMPUTE):
        words = [
            f"strategy.dense={dense}",
            f"trainer.precision={precision}",
            f"trainer.recompute={recompute}",
        ]
        config = load_for(path, ranks, samples, [*overrides, *words])
        if config.moe.capacity_factor is None:
            config = replace(config, moe=replace(config.moe, capacity_factor=1.0))
        facts = facts_of(dry_run(with_slots(config)))
        row = {
            "preset": path.stem,
            "dense": dense,
            "precision": precision,
            "recompute": recompute == "true",
        }
        yield row | {key: round(facts[key], 6) for key in ("peak_gib", "states_gib")}


def main(config: str, /, *words: KeyValue) -> None:
    """Run one training step of rank 0 of a large job in this process, on tensors without numbers,
    and count.

    Standard output is JSON.

    Args:
        config: a YAML file or the name of a shipped one; or presets, which runs every preset in
            each layout of dense weights, in two precisions, with recompute or not
        words: ranks=N for the number of ranks, on nodes of 8 or of trainer.devices=N (default: as
            CONFIG sets them), samples=N for the samples of a rank in a batch (default: 1), and
            key=value
    """
    sizes, overrides = numbers_of(words, ("ranks", "samples"))
    if "ranks" not in sizes and sizes:
        raise ConfigError(
            "command line: samples needs ranks. Give both, or data.global_batch_size alone"
        )
    from scmoe.config.load import load
    from scmoe.predict.costs import dry_run, load_for, with_slots
    from scmoe.report import Report, console, say

    ranks, samples = sizes.get("ranks"), sizes.get("samples", 1)
    if config == "presets":
        rows = []
        for row in preset_rows(ranks or 64, samples, overrides):
            cells = (
                four_digits(value) if isinstance(value, float) else str(value)
                for value in row.values()
            )
            console().print(" ".join(cells))
            rows.append(row)
        return print_result(rows)
    if ranks is None:
        loaded = load(config, overrides)
    else:
        loaded = load_for(config, ranks, samples, overrides)
    settings = with_slots(loaded)
    if settings != loaded:
        say("moe.rows=slots is set: a dry run has no data, so it counts every slot of the capacity")
    world = settings.trainer.devices * settings.trainer.num_nodes
    say(f"one step of rank 0 of {world:,} ranks is run on tensors without numbers")
    run = dry_run(settings)
    lines = {name: {"number": four_digits(number)} for name, number in numbers(run).items()}
    title = f"dry run of rank 0 of {world}, dense weights {settings.strategy.dense}"
    Report(title, lines, {"number": "{number}"}, "of rank 0").show()
    print_result(facts_of(run))
