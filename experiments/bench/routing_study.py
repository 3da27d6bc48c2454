"""How uneven the routing of real trainings is, in single steps: every step's expert ids are
recorded, before drops.

Each training runs in a process of its own, with analysis.record_routing=1. Load is the copies of
the busiest expert, or of the busiest of 2 or 4 expert-parallel ranks, over the fair share; the ids
give it for any number of ranks, whatever the training had. Of some steps of three trainings the ids
themselves are kept, for benches to replay.

    start, early, end    the first 25 steps, the 50 after them, the last 75
    sums                 the same of ten steps together, which is what moe/load_max shows
    dropped              share of copies that a capacity factor of 2 drops: an expert's slots are
                         those of a source rank
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe.config.extras import require
from scmoe.config.leaves import ConfigError
from scmoe.moe.balance import load_max
from scmoe.moe.layout import count, expert_capacity
from scmoe.probes.charts import BLUE, GREEN, ORANGE, chart, heading
from scmoe.probes.routing import Recorded, read_routing, selected, write_routing
from scmoe.report import Report, write_json

TWIN = ("experiment/table3/small", "trainer.max_steps=512")  # a quarter of the steps of the table
TOP_2 = ("moe.architecture=top_k", "moe.top_k=2")
RUNS = {  # a training's name: its config, and what it changes
    "quickstart": ("quickstart",),
    "no balance loss": ("quickstart", "moe.load_balance_coef=0"),
    "z-loss 0.001 too": ("quickstart", "moe.z_loss_coef=0.001"),
    "bias by sign": ("quickstart", "moe.load_balance_coef=0", "moe.bias_rate=0.02"),
    "bias in proportion": ("quickstart", "moe.load_balance_coef=0", "moe.router=longcat"),
    "sequence-wise loss": ("quickstart", "moe.router=deepseek", "moe.bias_rate=0"),
    "top-2": ("quickstart", *TOP_2),
    "Table 3, top-2": (*TWIN, "optim.lr=6e-3", *TOP_2),
    "Table 3, shared expert": (
        *TWIN,
        "optim.lr=1.2e-2",
        "moe.architecture=shared_expert",
        "moe.combine=cg2",
    ),
    "Table 3, Pos-2": (*TWIN, "optim.lr=1.2e-2"),
}
SHOWN = "quickstart"  # in the picture
KEPT = {  # whose ids are kept, and their files
    "quickstart": "routing-quickstart",
    "top-2": "routing-quickstart-top2",
    "Table 3, top-2": "routing-table3-top2",
}
KEPT_STEPS = (0, 10, 25, 50, 75, 100, 125, 150, 200, 250, 300, 349)
WINDOWS = {"start": slice(0, 25), "early": slice(25, 75), "end": slice(-75, None)}
SUMMED, FACTOR = 10, 2.0


def bench_routing(names: Sequence[str], work: Path, out: Path) -> dict[str, Any]:
    """Train what `work` does not have yet, and write report, picture and kept ids into `out`.
    Returns the report."""
    require("bench routing", "matplotlib")
    if unknown := [name for name in names if name not in RUNS]:
        raise ConfigError(
            f"{unknown[0]!r} is no training of this bench, allowed: {', '.join(RUNS)}"
        )
    folders = {name: trained(name, work) for name in names or RUNS}
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"rows": {}, "curves": []}
    for name, folder in folders.items():
        recorded = read_routing(folder)
        if name == SHOWN:
            report["curves"] = [curves(layer_SE) for layer_SE in loads(recorded)]
        if name in KEPT:
            kept = [step for step in KEPT_STEPS if step in recorded.steps]
            write_routing(selected(recorded, kept), out / f"{KEPT[name]}.safetensors")
        for layer, (ids_STK, counts_SE) in enumerate(
            zip(recorded.ids, loads(recorded), strict=True)
        ):
            dropped_S = drops(ids_STK, recorded.num_experts, recorded.num_ranks)
            own = {
                when: figures(counts_SE[steps], dropped_S[steps]) for when, steps in WINDOWS.items()
            }
            report["rows"][f"{name}, layer {layer}"] = own
    for table in tables(report):
        table.show()
    write_json(out / "routing.json", report)
    if report["curves"]:
        draw(report, out / "routing.png")
    return report


def trained(name: str, work: Path) -> Path:
    """Return the recorded routings of a training; train it if it is not there."""
    runs_dir = work / name.replace(", ", "-").replace(" ", "-").lower()
    if not (runs_dir / "done.json").exists():
        print(f"training {name}", file=sys.stderr)
        config, *words = RUNS[name]
        words += [
            "analysis.record_routing=1",
            f"runs_dir={runs_dir}",
            "logger.mode=disabled",
            "trainer.progress=false",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "scmoe", "train", config, *words], stdout=subprocess.PIPE
        )
        if done.returncode:
            raise ConfigError(
                f"the training {name!r} has failed, see above. Run the bench again after a repair"
            )
        (runs_dir / "done.json").write_bytes(done.stdout)
    summary = json.loads((runs_dir / "done.json").read_text(encoding="utf-8"))
    return Path(summary["run_dir"]) / "analysis" / "routing"


def loads(recorded: Recorded) -> list[Tensor]:
    """Return for each MoE layer the copies of each expert in each step, [S, E]."""
    return [count(ids_STK.flatten(1), recorded.num_experts) for ids_STK in recorded.ids]


def parts_of(num_experts: int) -> dict[str, int]:
    """Return whose load is reported: experts, and expert-parallel ranks."""
    return {"experts": num_experts, "EP 2": 2, "EP 4": 4}


def sums_of(counts_SE: Tensor) -> Tensor:
    """Return the copies of each ten steps together."""
    whole = len(counts_SE) // SUMMED * SUMMED
    return counts_SE[:whole].unflatten(0, (-1, SUMMED)).sum(1)


def drops(ids_STK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """Return the share of a layer's copies in each step that find no slot, [S]."""
    _, num_tokens, top_k = ids_STK.shape
    capacity = expert_capacity(num_tokens // num_ranks, num_experts, top_k, FACTOR)
    of_ranks = torch.stack(
        [count(own.flatten(1), num_experts) for own in ids_STK.chunk(num_ranks, dim=1)]
    )
    return (of_ranks - capacity).clamp(min=0).sum((0, 2)) / of_ranks.sum((0, 2)).clamp(min=1)


def figures(counts_SE: Tensor, dropped_S: Tensor) -> dict[str, Any]:
    """Return the load of some steps: quartiles, with the median between them, and the worst;
    medians of sums."""
    found: dict[str, Any] = {}
    for part, parts in parts_of(counts_SE.shape[1]).items():
        found[part] = [round(x, 2) for x in spread(load_max(counts_SE, parts))]
        found[f"sums of {part}"] = round(
            load_max(sums_of(counts_SE), parts).quantile(0.5).item(), 2
        )
    return found | {"dropped": [round(x, 3) for x in spread(dropped_S.double())]}


def spread(values: Tensor) -> list[float]:
    levels = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=values.dtype)
    return values.quantile(levels).tolist()


def curves(counts_SE: Tensor) -> dict[str, list[float]]:
    """Return the load of every step, and of sums of ten experts' steps, for the picture."""
    found = {
        part: load_max(counts_SE, parts) for part, parts in parts_of(counts_SE.shape[1]).items()
    }
    found["sums"] = load_max(sums_of(counts_SE), counts_SE.shape[1])
    return {name: [round(x, 2) for x in values.tolist()] for name, values in found.items()}


def tables(report: Mapping[str, Any]) -> list[Report]:
    four = (
        "{{{0}[{1}][1]:.2f}} [{{{0}[{1}][0]:.2f}}, {{{0}[{1}][2]:.2f}}] {{{0}[{1}][3]:.2f}}".format
    )
    found = []
    words = {"start": "The first 25 steps", "early": "Steps 25 to 74", "end": "The last 75 steps"}
    for when, steps in words.items():
        columns = {part: four(when, part) for part in ("experts", "EP 2", "EP 4")}
        columns["sums of ten steps: experts, EP 4"] = (
            f"{{{when}[sums of experts]:.2f}}, {{{when}[sums of EP 4]:.2f}}"
        )
        columns["dropped: median, worst"] = (
            f"{{{when}[dropped][1]:.0%}}, {{{when}[dropped][3]:.0%}}"
        )
        title = f"{steps}: median, quartiles and worst of single steps."
        found.append(Report(title, report["rows"], columns, "training"))
    return found


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the load of every step beside that of sums, a panel for each MoE layer."""
    layers = report["curves"]
    with chart(path, 1.0 + 2.2 * len(layers)) as figure:
        axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
        for layer, (axis, own) in enumerate(zip(axes, layers, strict=True)):
            axis.plot(
                own["experts"], color=BLUE, linewidth=0.8, label="busiest of 8 experts, a step"
            )
            axis.plot(own["EP 4"], color=ORANGE, linewidth=0.8, label="busiest of 4 ranks, a step")
            middles = [SUMMED * (i + 0.5) for i in range(len(own["sums"]))]
            axis.plot(
                middles,
                own["sums"],
                color=GREEN,
                linewidth=2,
                label="busiest expert, ten steps together",
            )
            axis.set(ylabel="load over the fair share", title=f"MoE layer {layer}", ylim=(1, None))
            axis.grid(axis="y")
        axes[-1].set_xlabel("optimizer step")
        heading(figure, "Uneven routing of the quickstart: sums over steps hide what a step has")
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside lower left",
            ncols=2,
            columnspacing=1.0,
        )
