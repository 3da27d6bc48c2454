from collections.abc import Mapping, Sequence
from typing import Any

from scmoe.command_line import KeyValue, numbers_of
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, four_digits
from scmoe.parallel.container_memory import GIB
from scmoe.report import console, print_result

# the fields that ep and dp set
RANKS = ("trainer.devices", "trainer.num_nodes", "strategy.ep_size")
MIB = 2**20
MOMENTS = {
    "adamw": "AdamW's two moments",
    "muon": "Muon's moment of matrices, AdamW's two of the rest",
}


def read(path: str, words: Sequence[str]) -> Config:
    """Return the config, checked for the given ranks."""
    from scmoe.config.derived import resolve_ep_size
    from scmoe.config.halved_batches import SENDS_NO_ROWS
    from scmoe.config.load import keys_of, load_config

    sizes, overrides = numbers_of(words, ("ep", "dp", "ranks", "samples"))
    if not sizes:
        return load_config(path, overrides)
    if {"ranks", "samples"} & {*sizes}:
        if "ranks" not in sizes or {"ep", "dp"} & {*sizes}:
            raise ConfigError(
                "command line: the ranks are either ranks=N, with samples=N, or ep=N and dp=N"
            )
        from scmoe.predict.costs import load_for

        return load_for(path, sizes["ranks"], sizes.get("samples", 1), overrides)
    for key in keys_of(overrides) & {*RANKS}:
        raise ConfigError(
            f"command line: {key} and ep or dp both set the ranks. Give one of the two"
        )
    if len(sizes) < 2:
        # Below, ep and dp replace the file's ranks, of which one alone may have no rows to send.
        no_rows = ("strategy.wire_dtype=null", *SENDS_NO_ROWS)
        config = load_config(path, [*overrides, *no_rows])
        ep_size = resolve_ep_size(config)
        ranks = config.trainer.devices * config.trainer.num_nodes
        sizes = {"ep": ep_size, "dp": ranks // ep_size, **sizes}
    words_of_ranks = [
        f"trainer.devices={sizes['ep'] * sizes['dp']}",
        "trainer.num_nodes=1",
        f"strategy.ep_size={sizes['ep']}",
    ]
    return load_config(path, [*overrides, *words_of_ranks])


def main(config: str, /, *words: KeyValue, counted: bool = False) -> None:
    """Estimate what a training costs, without starting it: parameters, FLOPs, bytes of All-to-All,
    memory of a rank.

    ep ranks share one set of experts, dp such sets are replicas: ep x dp ranks, data parallel over
    all of them. What is not given is as CONFIG sets it. Standard output is JSON, but nothing
    at a terminal; `total` of its memory_bytes is an upper bound.

    Args:
        config: a YAML file, such as configs/quickstart.yaml, or the name of a shipped one
        words: ep=N and dp=N for the ranks; or ranks=N, on nodes of 8 or of trainer.devices=N, with
            samples=N of a rank in a batch (default: 1); and key=value
        counted: run one training step of rank 0 in this process, on tensors without numbers, and
            count its FLOPs, bytes of collectives and peak memory instead
    """
    settings = read(config, words)
    if counted:
        count(settings)
        return
    from scmoe.predict.costs import estimate

    facts = estimate(settings)
    console().print(estimate_table(facts))
    print_result(facts)


def count(config: Config) -> None:
    """Print what one step of rank 0 does."""
    from scmoe.predict.costs import counted_step, with_slots
    from scmoe.report import Report, say

    settings = with_slots(config)
    if settings != config:
        say("moe.rows=slots is set: no data is read, so every slot of the capacity is counted")
    world = settings.trainer.devices * settings.trainer.num_nodes
    say(f"one step of rank 0 of {world:,} ranks is run on tensors without numbers")
    step = counted_step(settings)
    states = {"weights": step.weights, "gradients": step.gradients, "optimizer": step.optimizer}
    peak = sum(step.peak.values())
    numbers = {
        **{f"GiB of {name}": size / GIB for name, size in states.items()},
        **{f"GiB at the peak, made in {phase}": size / GIB for phase, size in step.peak.items()},
        "GiB at the peak": peak / GIB,
        "TFLOPs of a step": step.flops / 1e12,
        **{f"MiB of a step: {name}": size / MIB for name, size in step.collectives.items()},
    }
    lines = {name: {"number": four_digits(number)} for name, number in numbers.items()}
    title = f"counted step of rank 0 of {world}, dense weights {settings.strategy.dense}"
    Report(title, lines, {"number": "{number}"}, "of rank 0").show()
    facts = {
        "peak_gib": peak / GIB,
        "states_gib": sum(states.values()) / GIB,
        "flops": step.flops,
        "collectives": step.collectives,
    }
    print_result(facts)


def estimate_table(facts: Mapping[str, Any]) -> Any:
    """Return a line for each quantity: its name, its value, and how it was computed."""
    from rich.table import Column, Table

    ep = facts["ep_size"]
    sent = facts["all_to_all_bytes_per_token_and_transfer"]
    title = f"estimate for EP {ep} x DP {facts['dp_size']}, {facts['precision']}"
    table = Table(
        "quantity", Column("value", justify="right"), "how", title=title, title_justify="left"
    )
    table.add_row(
        "parameters", f"{facts['params_total']:,}", f"{facts['params_active']:,} active per token"
    )
    of_experts = f"{facts['params_per_rank_experts']:,} in 1/{ep} of the experts"
    table.add_row(
        "parameters of a rank", f"{facts['params_per_rank']:,}", of_experts, end_section=True
    )
    unit = {"token": "a token", "image": "an image"}[facts["unit"]]
    by_kind = ", ".join(
        f"{kind} {flops / 1e9:.3g}" for kind, flops in facts["flops_forward_by_kind"].items()
    )
    formula = "2 x weights of every product + 4 S A of every attention: "
    table.add_row(
        f"GFLOPs of {unit}, forward", four_digits(facts["flops_forward"] / 1e9), formula + by_kind
    )
    recomputed = " + forward of what is recomputed" if facts["recompute"] else ""
    table.add_row(
        f"GFLOPs of {unit}, training",
        four_digits(facts["flops_training"] / 1e9),
        f"3 x forward{recomputed}",
        end_section=True,
    )
    forward, training = (facts[f"all_to_all_bytes_{kind}"] for kind in ("forward", "training"))
    widths = " | ".join(f"{size:,.0f}" for size in sorted(set(sent))) or "no MoE module"
    table.add_row("All-to-All bytes of a token", widths, "one transfer of one MoE module")
    table.add_row(
        f"  of {unit}, forward", f"{forward:,.0f}", f"dispatch and combine, {len(sent)} modules"
    )
    table.add_row(f"  of {unit}, training", f"{training:,.0f}", "and their gradients")
    travel = f"{training * facts['all_to_all_share_that_travels']:,.0f}"
    table.add_row(
        "  of which leave a rank",
        travel,
        f"{ep - 1} of {ep} rows, if routing is even",
        end_section=True,
    )
    recompute = "on" if facts["recompute"] else "off"
    notes = {
        "weights": f"dense weights {facts['dense']}",
        "optimizer": MOMENTS.get(
            facts["optimizer"], f"AdamW's two moments; {facts['optimizer']} may differ"
        ),
        "gathered": "at most: gathered blocks, bfloat16 copies, gradients on their way",
        "activations": (
            f"at most, batch of {facts['samples_per_rank']} a rank, recompute {recompute}"
        ),
        "total": "upper bound on the peak of the step, without fragmentation",
    }
    for name, size in facts["memory_bytes"].items():
        table.add_row(
            f"MiB of a rank: {name}",
            f"{size / MIB:,.0f}",
            notes.get(name, ""),
            end_section=name == "total",
        )
    for name, size in facts["collectives_bytes"].items():
        table.add_row(
            f"MiB of a step: {name}",
            four_digits(size / MIB),
            "bytes that a rank sends, its own share included",
        )
    if (ratio := facts["rows_over_gradients"]) is not None:
        table.add_row(
            "rows over gradients",
            f"{ratio:.3g}",
            "bytes that leave a rank in a step; gradients by a ring",
        )
    return table
