"""Parameters of every preset and architecture: `python -m experiments.params [PRESET ...]`.

Presets are the files of configs/model. Models are built on the meta device, so nothing of their size is needed. The
last line on standard output is JSON: {preset: {architecture: {"total": ..., "active": ...}}}; active are those that a
token uses. Beside ours stand the paper's totals (Table 8; DGMoE-Share's in A.7).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.table import Table

from scmoe.config.fields import ConfigError
from scmoe.config.load import load

PRESETS = Path("configs/model")
# Positions share a row: a tap's norm has the same size everywhere. So do CG-1, CG-2 and Direct Add, to 2 D a module.
ARCHITECTURES = {
    "dense": "moe.architecture=dense",
    "top_1": "moe.architecture=top_k moe.top_k=1",
    "top_2": "moe.architecture=top_k moe.top_k=2",
    "top_3": "moe.architecture=top_k moe.top_k=3",
    "shared_expert": "moe.architecture=shared_expert moe.top_k=1",
    "scmoe": "moe.architecture=scmoe moe.top_k=1",
    "scmoe_2": "moe.architecture=scmoe moe.top_k=2",
    "dgmoe": "moe.architecture=dgmoe moe.top_k=1",
    "dgmoe_share": "moe.architecture=dgmoe_share moe.top_k=1",
}
PAPER = {  # Table 8's totals are those of standard top-2
    ("gpt2_moe_small", "top_2"): "323M",
    ("gpt2_moe_medium", "top_2"): "1.7B",
    ("gpt3_moe_xl", "top_2"): "4.1B",
    ("llama2_moe", "top_2"): "6.7B",
    ("swinv2_moe_s", "dgmoe"): "157M",
    ("swinv2_moe_s", "dgmoe_share"): "124M",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="params", description="Count the parameters of presets and architectures.")
    parser.add_argument("presets", nargs="*", help=f"names of files in {PRESETS}, without .yaml (default: all)")
    names = parser.parse_args(arguments).presets or sorted(path.stem for path in PRESETS.glob("*.yaml"))
    try:
        counts = {name: {architecture: count(name, architecture) for architecture in ARCHITECTURES} for name in names}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from scmoe.training.run.report import console

    console().print(table(counts))
    print(json.dumps(counts))
    return 0


def count(preset: str, architecture: str) -> dict[str, int]:
    from scmoe.training.build.model import build_model_on_meta
    from scmoe.training.run.report import count_parameters, total_and_active

    config = load(PRESETS / f"{preset}.yaml", ARCHITECTURES[architecture].split())
    total, active = total_and_active(count_parameters(build_model_on_meta(config)))
    return {"total": total, "active": active}


def table(counts: dict[str, dict[str, dict[str, int]]]) -> Table:
    made = Table("preset", "architecture", title="parameters", title_justify="left", title_style="bold")
    for column in ("total", "active per token", "paper"):
        made.add_column(column, justify="right")
    for preset, rows in counts.items():
        for i, (architecture, sizes) in enumerate(rows.items()):
            paper = PAPER.get((preset, architecture), "")
            name = preset if i == 0 else ""
            made.add_row(name, architecture, f"{sizes['total']:,}", f"{sizes['active']:,}", paper)
        made.add_section()
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
