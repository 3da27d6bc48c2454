"""`scmoe params` counts parameters of presets and architectures, and shows the published totals
beside them.

Presets are the files of configs/model. Those of the paper have a row for each architecture (Table 8
and A.7); a preset of another publication, which names its router, has the one of its own. Models
are built on the meta device, so they need no memory.
"""

from scmoe.config.load import SHIPPED, load_config
from scmoe.report import Report, print_result

PRESETS = SHIPPED / "model"
NO_TAP = "moe.position=pos2"  # the default: without a tap no other position is allowed
# Positions share a row: a tap's norm has the same size everywhere. So do CG-1, CG-2 and Direct Add,
# to 2 D a module.
COUNTED_ARCHITECTURES = {
    "dense": f"moe.architecture=dense {NO_TAP}",
    "top_1": f"moe.architecture=top_k moe.top_k=1 {NO_TAP}",
    "top_2": f"moe.architecture=top_k moe.top_k=2 {NO_TAP}",
    "top_3": f"moe.architecture=top_k moe.top_k=3 {NO_TAP}",
    "shared_expert": f"moe.architecture=shared_expert moe.top_k=1 {NO_TAP}",
    "scmoe": "moe.architecture=scmoe moe.top_k=1",
    "scmoe_2": "moe.architecture=scmoe moe.top_k=2",
    "dgmoe": "moe.architecture=dgmoe moe.top_k=1",
    "dgmoe_share": "moe.architecture=dgmoe_share moe.top_k=1",
}
PUBLISHED = {  # Table 8's totals are those of standard top-2
    ("gpt2_moe_small", "top_2"): "323M",
    ("gpt2_moe_medium", "top_2"): "1.7B",
    ("gpt3_moe_xl", "top_2"): "4.1B",
    ("llama2_moe", "top_2"): "6.7B",
    ("swinv2_moe_s", "dgmoe"): "157M",
    ("swinv2_moe_s", "dgmoe_share"): "124M",
    ("longcat_flash", "scmoe"): "560B",
    ("instella_moe", "farskip"): "15,862,789,248",
}


def main(*presets: str) -> None:
    """Count the parameters of presets and architectures, and show the published totals beside them.

    Standard output is JSON: {preset: {architecture: {"total": ..., "active": ...}}}; active
    parameters are those that one token uses.

    Args:
        presets: names of files in configs/model, without .yaml (default: all)
    """
    names = presets or sorted(path.stem for path in PRESETS.glob("*.yaml"))
    counts = {
        name: {row: count(name, words) for row, words in rows(name).items()} for name in names
    }
    shown = {}
    for preset, each in counts.items():
        for row, sizes in each.items():
            shown[f"{preset}, {row}"] = {**sizes, "published": PUBLISHED.get((preset, row), "")}
    columns = {"total": "{total:,}", "active per token": "{active:,}", "published": "{published}"}
    Report("parameters", shown, columns, "preset, architecture").show()
    print_result(counts)


def rows(preset: str) -> dict[str, str]:
    """Return the architectures in which a preset is counted, each with its overrides."""
    moe = load_config(f"configs/model/{preset}.yaml").moe
    is_paper_s = moe.router == "softmax" and moe.architecture == "scmoe"
    return COUNTED_ARCHITECTURES if is_paper_s else {moe.architecture: ""}


def count(preset: str, words: str) -> dict[str, int]:
    """Return all parameters, and those that one token uses. words: overrides."""
    from scmoe.models.model_cost import count_parameters, total_and_active
    from scmoe.training.assembly.model import build_model_on_meta

    config = load_config(f"configs/model/{preset}.yaml", words.split())
    total, active = total_and_active(count_parameters(build_model_on_meta(config)))
    return {"total": total, "active": active}
