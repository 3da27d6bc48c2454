"""Renders what a run prints: the resolved config as a tree, the model as a table, the summary as a panel."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from torch import nn

from scmoe.footprint.model_cost import parts, routed_copies
from scmoe.moe.experts import Experts


def config_tree(config: Any, label: str = "config") -> Tree:
    tree = Tree(Text(label, style="bold"))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            tree.add(config_tree(value, field.name))
        else:
            tree.add(Text.assemble(f"{field.name}: ", (str("null" if value is None else value), "cyan")))
    return tree


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return per kind of module: the number of modules, all parameters, and the parameters that one token uses.

    Experts count whole, also where this rank holds a shard. Of num_experts a token uses top_k, and others in each
    further use of the module (DGMoE, DGMoE-Share) as long as there are others.
    """
    counts: dict[str, tuple[int, int, int]] = {}
    used: dict[nn.Module, float] = {
        experts: min(1.0, copies / experts.num_experts) for experts, copies in routed_copies(model).items()
    }
    for kind, module, own in parts(model):
        size = sum(p.numel() for p in own)
        if isinstance(module, Experts):
            size = size * module.num_experts // len(module.expert_ids)
        modules, total, active = counts.get(kind, (0, 0, 0))
        counts[kind] = (modules + 1, total + size, active + round(size * used.get(module, 1.0)))
    return counts


def total_and_active(counts: Mapping[str, tuple[int, int, int]]) -> tuple[int, int]:
    return sum(total for _, total, _ in counts.values()), sum(active for _, _, active in counts.values())


def model_table(counts: Mapping[str, tuple[int, int, int]]) -> Table:
    table = Table("part", title="model", title_justify="left", title_style="bold", show_footer=True)
    total, active = total_and_active(counts)
    table.columns[0].footer = "all"
    table.add_column("modules", justify="right")
    table.add_column("parameters", justify="right", footer=f"{total:,}")
    table.add_column("active per token", justify="right", footer=f"{active:,}")
    for kind, (modules, size, used) in counts.items():
        table.add_row(kind, str(modules), f"{size:,}", f"{used:,}")
    return table


def summary_panel(summary: Mapping[str, Any], samples: list[str]) -> Panel:
    """Return results and samples as a panel."""
    table = Table.grid(padding=(0, 2))
    rows = {"steps": f"{summary['steps']:,} on {summary['world_size']} ranks, EP = {summary['ep_size']}"}
    unit = "images" if "val_accuracy" in summary else "tokens"
    if summary["val_loss"] is None:
        rows["validation"] = "none, as trainer.limit_val_batches is 0"
    elif unit == "images":
        rows["validation loss"] = f"{summary['val_loss']:.4f} nats per image"
        rows["accuracy"] = f"{summary['val_accuracy']:.2%} of the validation images of {summary['data']}"
    else:
        rows["validation loss"] = f"{summary['val_loss']:.4f} nats per token, perplexity {summary['perplexity']:.2f}"
        rows["bits per byte"] = f"{summary['bits_per_byte']:.4f}"
        if unigram := summary["unigram_bits_per_byte"]:
            rows["bits per byte"] += f"; unigram {unigram:.4f}, ratio {summary['bits_per_byte'] / unigram:.3f}"
    rate, tflops = summary[f"{unit}_per_s"], summary["model_tflops"]
    rows["throughput"] = f"{rate:,.0f} {unit}/s over all ranks" if rate else "not measured: too few steps"
    if rate:
        mfu = f", MFU {summary['mfu']:.1%}" if "mfu" in summary else ""
        rows["model FLOP/s"] = f"{tflops:.3g} TFLOP/s on each device{mfu}"
    if "peak_host_gib" in summary:
        device = f"; {summary['peak_device_gib']:.2f} GiB of a GPU" if "peak_device_gib" in summary else ""
        rows["peak memory"] = f"{summary['peak_host_gib']:.2f} GiB of the host{device}, the rank with most"
    if summary["load_max_ratio"] is not None:
        rows["expert load"] = f"busiest expert {summary['load_max_ratio']:.2f} x the mean, in the worst layer"
        rows["dropped"] = f"{summary['drop_share']:.2%} of routed tokens"
    if summary["skipped"]:
        rows["skipped"] = f"{summary['skipped']:,} times a file that cannot be read (data.on_error=skip)"
    rows["run directory"] = str(summary["run_dir"])
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    for text in samples:
        table.add_row(Text("sample", style="bold"), Text(" ".join(text.split()), overflow="ellipsis", no_wrap=True))
    return Panel(table, title="run finished", title_align="left")


def console() -> Console:
    """Return a console on standard error, as standard output is JSON: as wide as the terminal, or 100 columns."""
    terminal = Console(stderr=True, highlight=False)
    return terminal if terminal.is_terminal else Console(stderr=True, highlight=False, width=100)
