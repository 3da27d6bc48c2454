"""What a training would take, without starting it: `python -m experiments.plan CONFIG [ep=N] [dp=N] [key=value ...]`.

ep ranks share one set of experts, dp such sets are replicas of each other: ep x dp ranks, data parallel over all of
them. What is not given is as CONFIG has it. Parameters, FLOPs, bytes of All-to-All and memory of a rank, read off the
model on the meta device; the formulas are in scmoe/analysis/cost.py and memory.py. The last line on standard output is
JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.table import Table

from scmoe.config.fields import Config, ConfigError
from scmoe.config.load import load
from scmoe.config.rules import resolve_ep_size

USAGE = "usage: python -m experiments.plan CONFIG [ep=N] [dp=N] [key=value ...]"
RANKS = ("trainer.devices", "trainer.num_nodes", "strategy.ep_size")  # what ep and dp say
MIB = 2**20


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    try:
        config, ep_size, dp_size = read(arguments)
        facts = plan(config, ep_size, dp_size)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from scmoe.training.run.report import console

    console().print(table(facts))
    print(json.dumps(facts))
    return 0


def read(arguments: list[str]) -> tuple[Config, int, int]:
    """The config, checked for the given ranks, and the two degrees."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"no config given: {USAGE.removeprefix('usage: ')}")
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
            raise ConfigError(f"command line: {key} beside ep or dp, allowed: one of the two ways to say it")
    if len(sizes) < 2:
        config = load(arguments[0], overrides)
        own_ep = resolve_ep_size(config)
        own = {"ep": own_ep, "dp": config.trainer.devices * config.trainer.num_nodes // own_ep}
        if not sizes:
            return config, own["ep"], own["dp"]
        sizes = own | sizes
    ranks = [f"trainer.devices={sizes['ep'] * sizes['dp']}", "trainer.num_nodes=1", f"strategy.ep_size={sizes['ep']}"]
    return load(arguments[0], [*overrides, *ranks]), sizes["ep"], sizes["dp"]


def plan(config: Config, ep_size: int, dp_size: int) -> dict[str, Any]:
    from scmoe.analysis.cost import (
        forward_flops,
        moe_uses,
        rank_parameters,
        training_flops,
        transfer_bytes,
    )
    from scmoe.analysis.memory import rank_memory
    from scmoe.training.build.model import build_model_on_meta
    from scmoe.training.run.report import count_parameters, total_and_active

    trainer, data = config.trainer, config.data
    model = build_model_on_meta(config)
    total, active = total_and_active(count_parameters(model))
    replicated, experts = rank_parameters(model, ep_size)
    samples = data.global_batch_size // (ep_size * dp_size * trainer.accumulate)
    pictures = config.model.family == "swin"
    unit, tokens = ("image", 1) if pictures else ("token", data.seq_len)
    forward = forward_flops(model, data.seq_len)
    recompute = trainer.recompute
    sent = transfer_bytes(model, trainer.precision)
    rows = model.rows_per_sample(data.seq_len)
    together = sum(size * rows[moe] for size, (moe, _) in zip(sent, moe_uses(model), strict=True)) / tokens
    memory = rank_memory(
        model,
        seq_len=data.seq_len,
        samples=samples,
        precision=trainer.precision,
        ep_size=ep_size,
        dp_size=dp_size,
        recompute=recompute,
        on_gpu=trainer.accelerator != "cpu",
    )
    return {
        "ep_size": ep_size,
        "dp_size": dp_size,
        "precision": trainer.precision,
        "recompute": recompute,
        "samples_per_rank": samples,
        "params_total": total,
        "params_active": active,
        "params_per_rank": replicated + experts,
        "params_per_rank_experts": experts,
        "unit": unit,
        "flops_forward": sum(forward.values()) / tokens,
        "flops_training": training_flops(forward, recompute) / tokens,
        "flops_forward_by_kind": {kind: flops / tokens for kind, flops in forward.items()},
        "all_to_all_bytes_per_token_and_transfer": sent,
        "all_to_all_bytes_forward": 2 * together,
        "all_to_all_bytes_training": 4 * together,
        "all_to_all_share_that_travels": (ep_size - 1) / ep_size,
        "memory_bytes": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
            "total": memory.total,
        },
    }


def table(facts: dict[str, Any]) -> Table:
    ep, dp, sent = facts["ep_size"], facts["dp_size"], facts["all_to_all_bytes_per_token_and_transfer"]
    made = Table("of", "number", "how", title=f"plan for EP {ep} x DP {dp}, {facts['precision']}", title_justify="left")
    made.columns[1].justify = "right"
    whole, a_token, a_rank = facts["params_total"], facts["params_active"], facts["params_per_rank"]
    made.add_row("parameters", f"{whole:,}", f"{a_token:,} active per token")
    made.add_row(
        "parameters of a rank", f"{a_rank:,}", f"{facts['params_per_rank_experts']:,} in 1/{ep} of the experts"
    )
    made.add_section()
    unit = {"token": "a token", "image": "an image"}[facts["unit"]]
    by_kind = ", ".join(f"{kind} {flops / 1e9:.3g}" for kind, flops in facts["flops_forward_by_kind"].items())
    formula = "2 x weights of every product + 4 S D of every attention: "
    made.add_row(f"GFLOPs of {unit}, forward", f"{facts['flops_forward'] / 1e9:.4g}", formula + by_kind)
    anew = " + forward of what is recomputed" if facts["recompute"] else ""
    made.add_row(f"GFLOPs of {unit}, training", f"{facts['flops_training'] / 1e9:.4g}", f"3 x forward{anew}")
    made.add_section()
    forward, training = (facts[f"all_to_all_bytes_{kind}"] for kind in ("forward", "training"))
    widths = " | ".join(f"{size:,.0f}" for size in sorted(set(sent))) or "no MoE module"
    made.add_row("All-to-All bytes of a token", widths, "one transfer of one MoE module")
    made.add_row(f"  of {unit}, forward", f"{forward:,.0f}", f"dispatch and combine, {len(sent)} modules")
    made.add_row(f"  of {unit}, training", f"{training:,.0f}", "and their gradients")
    made.add_row("  of which travel", f"{training * facts['all_to_all_share_that_travels']:,.0f}", f"{ep - 1} of {ep}")
    made.add_section()
    how = {
        "weights": "",
        "gradients": "" if dp == 1 else "and the experts' while they are averaged",
        "optimizer": "AdamW's two moments",
        "activations": f"estimate, batch of {facts['samples_per_rank']} a rank, recompute "
        + ("on" if facts["recompute"] else "off"),
        "total": "without the allocator's gaps and buffers of transfers",
    }
    for name, size in facts["memory_bytes"].items():
        made.add_row(f"MiB of a rank: {name}", f"{size / MIB:,.0f}", how[name])
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
