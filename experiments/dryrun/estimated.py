"""What a training costs, without starting it: parameters, FLOPs, bytes of collectives, memory of a rank.

ep ranks share one set of experts, dp such sets are replicas: ep x dp ranks, data parallel over all of them. Numbers are
read off the model on the meta device; the formulas are in scmoe/analysis: cost.py, traffic.py, memory.py and
step_memory.py. `scmoe dryrun` checks them (testbed/dry_run).
"""

from typing import Any

from rich.table import Column, Table

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.registry import IMAGES
from scmoe.experiments.dryrun.traffic import step_traffic
from scmoe.footprint.memory import rank_memory
from scmoe.footprint.model_cost import forward_flops, moe_uses, rank_parameters, training_flops, transfer_bytes
from scmoe.footprint.split import Split
from scmoe.training.assembly.model import build_model_on_meta, updated_by_muon
from scmoe.training.run.printout import count_parameters, total_and_active

MIB = 2**20
MOMENTS = {"adamw": "AdamW's two moments", "muon": "Muon's moment of matrices, AdamW's two of the rest"}


def estimate(config: Config, ep_size: int, dp_size: int) -> dict[str, Any]:
    """Return the costs of a config on ep_size x dp_size ranks: per token (image), and for one rank."""
    trainer, data, dense = config.trainer, config.data, config.strategy.dense
    if dense == "auto":
        raise ConfigError("strategy.dense is auto, allowed in an estimate: replicated | sharded | hybrid")
    model = build_model_on_meta(config)
    total, active = total_and_active(count_parameters(model))
    replicated, experts = rank_parameters(model, ep_size)
    samples = data.global_batch_size // (ep_size * dp_size * trainer.accumulate)
    unit, tokens = ("image", 1) if config.data.name in IMAGES else ("token", data.seq_len)
    forward = forward_flops(model, data.seq_len)
    wire_bytes = None if config.strategy.wire_dtype is None else 2
    sent, rows = transfer_bytes(model, trainer.precision, wire_bytes), model.rows_per_sample(data.seq_len)
    together = sum(size * rows[moe] for size, (moe, _) in zip(sent, moe_uses(model), strict=True)) / tokens
    given: dict[str, Any] = {"ep_size": ep_size, "dp_size": dp_size}
    given |= {"precision": trainer.precision, "recompute": trainer.recompute}
    on_gpu = trainer.accelerator != "cpu"
    layout: dict[str, Any] = {"dense": dense, "node_size": trainer.devices}
    batch: dict[str, Any] = {"seq_len": data.seq_len, "samples": samples}
    update: dict[str, Any] = {"by_muon": updated_by_muon(config, model), "accumulate": trainer.accumulate}
    memory = rank_memory(model, **batch, on_gpu=on_gpu, **given, **layout, **update)
    split = Split(model, dense, ep_size, dp_size, trainer.devices, trainer.precision)
    collectives = step_traffic(split, **batch, accumulate=trainer.accumulate, wire_bytes=wire_bytes)
    return {
        **given,
        "optimizer": config.optim.name,
        "dense": dense,
        "samples_per_rank": samples,
        "params_total": total,
        "params_active": active,
        "params_per_rank": replicated + experts,
        "params_per_rank_experts": experts,
        "unit": unit,
        "flops_forward": sum(forward.values()) / tokens,
        "flops_training": training_flops(forward, trainer.recompute) / tokens,
        "flops_forward_by_kind": {kind: flops / tokens for kind, flops in forward.items()},
        "all_to_all_bytes_per_token_and_transfer": sent,
        "all_to_all_bytes_forward": 2 * together,
        "all_to_all_bytes_training": 4 * together,
        "all_to_all_share_that_travels": (ep_size - 1) / ep_size,
        "memory_bytes": memory,
        "collectives_bytes": collectives,
    }


def estimate_table(facts: dict[str, Any]) -> Table:
    ep, dp, sent = facts["ep_size"], facts["dp_size"], facts["all_to_all_bytes_per_token_and_transfer"]
    title = f"estimate for EP {ep} x DP {dp}, {facts['precision']}"
    made = Table("quantity", Column("value", justify="right"), "how", title=title, title_justify="left")
    made.add_row("parameters", f"{facts['params_total']:,}", f"{facts['params_active']:,} active per token")
    of_experts = f"{facts['params_per_rank_experts']:,} in 1/{ep} of the experts"
    made.add_row("parameters of a rank", f"{facts['params_per_rank']:,}", of_experts, end_section=True)
    unit = {"token": "a token", "image": "an image"}[facts["unit"]]
    by_kind = ", ".join(f"{kind} {flops / 1e9:.3g}" for kind, flops in facts["flops_forward_by_kind"].items())
    formula = "2 x weights of every product + 4 S D of every attention: "
    made.add_row(f"GFLOPs of {unit}, forward", f"{facts['flops_forward'] / 1e9:.4g}", formula + by_kind)
    flops, again = facts["flops_training"], " + forward of what is recomputed" if facts["recompute"] else ""
    made.add_row(f"GFLOPs of {unit}, training", f"{flops / 1e9:.4g}", f"3 x forward{again}", end_section=True)
    forward, training = (facts[f"all_to_all_bytes_{kind}"] for kind in ("forward", "training"))
    widths = " | ".join(f"{size:,.0f}" for size in sorted(set(sent))) or "no MoE module"
    made.add_row("All-to-All bytes of a token", widths, "one transfer of one MoE module")
    made.add_row(f"  of {unit}, forward", f"{forward:,.0f}", f"dispatch and combine, {len(sent)} modules")
    made.add_row(f"  of {unit}, training", f"{training:,.0f}", "and their gradients")
    travel = f"{training * facts['all_to_all_share_that_travels']:,.0f}"
    made.add_row("  of which travel", travel, f"{ep - 1} of {ep}", end_section=True)
    recompute = "on" if facts["recompute"] else "off"
    notes = {
        "weights": f"dense weights {facts['dense']}",
        "optimizer": MOMENTS.get(facts["optimizer"], f"AdamW's two moments; {facts['optimizer']} may differ"),
        "gathered": "the largest block while its weights are whole",
        "activations": f"estimate, batch of {facts['samples_per_rank']} a rank, recompute {recompute}",
        "total": "when most is there, without the allocator's gaps: the experts' gradients come while activations go",
    }
    for name, size in facts["memory_bytes"].items():
        made.add_row(f"MiB of a rank: {name}", f"{size / MIB:,.0f}", notes.get(name, ""), end_section=name == "total")
    for name, size in facts["collectives_bytes"].items():
        made.add_row(f"MiB of a step: {name}", f"{size / MIB:,.4g}", "bytes that a rank sends, its own share included")
    return made
