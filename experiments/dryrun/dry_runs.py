"""Dry runs beside the estimate: one of a config, or a table over presets, layouts, precisions and recompute.

The dry run takes rank 0's training step on fake tensors (testbed/dry_run); the estimate computes the same numbers from
the model's modules (experiments/dryrun/estimated.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from rich.table import Column, Table

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.load import SHIPPED, load
from scmoe.config.rules import resolve_ep_size
from scmoe.experiments.dryrun.counted_step import DryRun, dry_run
from scmoe.experiments.dryrun.estimated import estimate

GIB = 2**30
NODE = 8  # ranks of a node, where there are more and trainer.devices is not given
WAYS, PRECISIONS, RECOMPUTE = ("replicated", "sharded"), ("32-true", "bf16-mixed"), ("false", "true")


def load_for(source: Any, ranks: int, samples: int, overrides: Sequence[str]) -> Config:
    """Return the config on so many ranks with so many samples each, on nodes of NODE ranks, or of trainer.devices if
    an override sets them.

    ConfigError: ranks is no multiple of a node's, an override sets what ranks and samples decide, or a rule is broken.
    """
    given = dict(override.removeprefix("--").split("=", 1) for override in overrides if "=" in override)
    for key in ("trainer.num_nodes", "data.global_batch_size"):
        if key in given:
            raise ConfigError(f"command line: {key} is {given[key]}, allowed: ranks=N samples=N, which set it")
    node = given.get("trainer.devices", str(min(NODE, ranks)))
    if node.isdecimal() and int(node) > 0 and ranks % int(node):
        allowed = f"multiples of the ranks of a node, {node}; trainer.devices=N sets another number"
        raise ConfigError(f"command line: ranks is {ranks}, allowed: {allowed}")
    nodes = ranks // int(node) if node.isdecimal() and int(node) > 0 else 1  # else `load` refuses trainer.devices
    sizes = [f"trainer.num_nodes={nodes}", f"data.global_batch_size={ranks * samples}"]
    return load(source, [f"trainer.devices={node}", *overrides, *sizes])


def with_slots(config: Config) -> Config:
    """Return the config with moe.rows=slots where `auto` would mean filled slots, whose number depends on the data."""
    moe, on_cpu = config.moe, config.trainer.accelerator == "cpu"
    limited = moe.architecture != "dense" and moe.capacity_factor is not None
    return replace(config, moe=replace(moe, rows="slots")) if limited and on_cpu and moe.rows == "auto" else config


def compare(config: Config) -> tuple[DryRun, dict[str, Any]]:
    """Return a dry run, and what it and the estimate say. error: of the estimate, as a share of the peak."""
    run = dry_run(config)
    ep_size = resolve_ep_size(config)
    facts = estimate(config, ep_size, config.trainer.devices * config.trainer.num_nodes // ep_size)
    peak, estimated = sum(run.peak.values()), facts["memory_bytes"]["total"]
    return run, {
        "peak_gib": peak / GIB,
        "states_gib": (run.weights + run.gradients + run.optimizer) / GIB,
        "estimate_gib": estimated / GIB,
        "error": estimated / peak - 1,
        "flops": run.flops,
        "collectives": run.collectives,
    }


def dry_run_table(run: DryRun, facts: dict[str, Any], title: str) -> Table:
    made = Table("of rank 0", Column("number", justify="right"), title=title, title_justify="left")
    for name in ("weights", "gradients", "optimizer"):
        made.add_row(f"GiB of {name}", f"{getattr(run, name) / GIB:,.4g}", end_section=name == "optimizer")
    for phase, size in run.peak.items():
        made.add_row(f"GiB at the peak, made in {phase}", f"{size / GIB:,.4g}")
    made.add_row("GiB at the peak", f"{facts['peak_gib']:,.4g}")
    made.add_row("GiB by the estimate", f"{facts['estimate_gib']:,.4g} ({facts['error']:+.1%})", end_section=True)
    made.add_row("TFLOPs of a step", f"{run.flops / 1e12:,.4g}", end_section=True)
    for name, size in run.collectives.items():
        made.add_row(f"MiB of a step: {name}", f"{size / 2**20:,.4g}")
    return made


def preset_rows(ranks: int, samples: int, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield `compare` of every preset with each layout of dense weights, in two precisions, with recompute or not."""
    presets = sorted((SHIPPED / "model").glob("*.yaml"))
    for path, dense, precision, recompute in product(presets, WAYS, PRECISIONS, RECOMPUTE):
        words = [f"strategy.dense={dense}", f"trainer.precision={precision}", f"trainer.recompute={recompute}"]
        facts = compare(with_slots(load_for(path, ranks, samples, [*overrides, *words])))[1]
        sizes = {key: round(facts[key], 6) for key in ("peak_gib", "states_gib", "estimate_gib", "error")}
        yield {"preset": path.stem, "dense": dense, "precision": precision, "recompute": recompute == "true", **sizes}
