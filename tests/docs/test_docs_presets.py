"""Tables of the docs that say what presets are: each row is rendered from its preset, or compared
with it."""

import re
from pathlib import Path

import pytest

from experiments.bench.pairs import WIRINGS
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.cli import params as parameters
from scmoe.config.fields import Config
from scmoe.config.leaves import flatten
from scmoe.config.load import load
from scmoe.moe.router import softmax
from scmoe.training.assembly.blocks import ROUTERS
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.weights.families import READERS
from scmoe.weights.hf_config import hf_config

DOCS = Path(__file__).parents[2] / "docs"
PRESETS = {  # a model's name in the tables: its preset
    "ScMoE": "quickstart",
    "LongCat-Flash": "model/longcat_flash",
    "NVIDIA": "model/nvidia_shortcut",
    "NVIDIA Megatron-LM": "model/nvidia_shortcut",
    "NousResearch": "model/nous",
    "FarSkip": "model/instella_moe",
    "FarSkip, Instella-MoE": "model/instella_moe",
}
OF_OTHERS = [name for name in PRESETS if name != "ScMoE"]
WIRING = (
    "architecture",
    "every",
    "position",
    "first_position",
    "tap_norm",
    "combine",
    "after_norm",
)
NOT_IN_FARSKIP = ("position", "combine")  # it has one position, and adds


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading; the first row is the table's head."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.M)[:1]
    lines = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table.splitlines()]
    return [
        [cell.strip() for cell in line] for line in lines if not set("".join(line)) <= set(" -")
    ]


def row_of(page: str, heading: str, name: str) -> list[str]:
    (row,) = (row for row in rows(page, heading) if row[0] == name)
    return row


def words(cell: str) -> list[str]:
    """Return the overrides in the backticks of a cell."""
    return [word for text in re.findall(r"`([^`]*)`", cell) for word in text.split() if "=" in word]


def wiring(config: Config) -> dict[str, object]:
    fields = [
        key for key in WIRING if config.moe.architecture != "farskip" or key not in NOT_IN_FARSKIP
    ]
    return {key: getattr(config.moe, key) for key in fields}


# ---------------------------------------------------------------------- shortcuts.md


def test_the_overrides_of_each_shortcut_give_the_wiring_of_its_preset():
    table = rows("shortcuts.md", "## How to get each one")[1:]
    assert [row[0] for row in table] == [
        "ScMoE",
        "LongCat-Flash",
        "NVIDIA",
        "NousResearch",
        "FarSkip",
    ]
    for name, overrides, file in table:
        assert wiring(load("quickstart", words(overrides))) == wiring(load(PRESETS[name])), name
        assert file == "the same" or (DOCS.parent / file.strip("`")).exists()


def read_by_the_experts(config: Config) -> str:
    if config.moe.architecture == "farskip":
        return "X"
    in_every_block = {"pos1": "X, the block's input", "pos2": "M of the preceding block"}
    return (
        in_every_block[config.moe.position]
        if config.moe.every == 1
        else f"Pos-{config.moe.position[3]}"
    )


def norms(config: Config) -> str:
    if config.moe.architecture == "farskip":
        return "one for both experts"
    tap = "the tap's own" if config.moe.tap_norm == "own" else "the tap shares the MLP's"
    return f"{tap}, and one after SE + R" if config.moe.after_norm else tap


@pytest.mark.parametrize("name", [row[0] for row in rows("shortcuts.md", "# Which shortcut?")[2:]])
def test_what_a_shortcut_computes_is_what_its_preset_builds(name):
    config = load(f"{PRESETS[name]}_tiny")
    *_, last = moe_blocks_of(build_model_on_meta(config))
    window = ", ".join(
        "MLP" if operator == "mlp" else operator.replace("_", " ")
        for operator in last.schedule.window
    )
    each = {1: "every block", 2: "every second block"}[config.moe.every]
    row = row_of("shortcuts.md", "# Which shortcut?", name)
    assert (row[1], *row[4:]) == (read_by_the_experts(config), norms(config), each, window)


@pytest.mark.parametrize(
    ("row", "name"), [("nvidia", "NVIDIA"), ("nous", "NousResearch"), ("farskip", "FarSkip")]
)
def test_a_row_of_the_bench_has_the_wiring_of_its_preset(row, name):
    assert wiring(load("quickstart", ["moe.every=1", *WIRINGS[row]])) == wiring(load(PRESETS[name]))


# ---------------------------------------------------------------------- other pages


def test_overrides_of_the_configuration_page_load():
    """Words in one pair of backticks go together, except those that name a file of the user's."""
    table = rows("configuration.md", "## Overrides")[1:]
    assert len(table) > 40
    for _, cell in table:
        for text in re.findall(r"`([^`]*=[^`]*)`", cell):
            if "my_package" not in text and "strategy.ep_size` times" not in text:
                load("quickstart", [word for word in text.split() if "=" in word])


def test_relatives_of_longcat_are_read_and_exported_as_the_table_says():
    for name, there, preset, exported in rows("how-to/longcat.md", "## Relatives")[1:]:
        config = load("quickstart", words(preset)) if words(preset) else load(preset.strip("`"))
        assert there.split("`")[1] in READERS, name
        assert hf_config(config, None)["model_type"] == exported.strip("`"), name


def test_a_folder_has_the_type_that_the_hugging_face_page_says():
    table = rows("hugging-face.md", "can use it:\n")[1:]
    assert {row[1] for row in table} == {
        f"`{name}`" for name in READERS.keys() - {"instella_moe"} | {"scmoe"}
    }
    said = {  # what a row says in words
        ", dense": ["moe.architecture=dense", "strategy.ep_size=null"],
        "attention=latent": ["model.family=llama"],
        "ScMoE at Pos-2": ["moe.position=pos2", "moe.every=2"],
        "a `model.latent.q_rank`": ["model.latent.q_rank=16"],
    }
    for cell, model_type in table[:-1]:
        in_words = [word for text, meant in said.items() if text in cell for word in meant]
        config = load("quickstart", ["moe.top_k=2", *in_words, *words(cell)])
        assert hf_config(config, None)["model_type"] == model_type.strip("`"), cell


def test_the_overlay_of_eight_gpus_is_the_table():
    overlay = flatten(load("strategy/ep8"))
    for field, value, _ in rows("how-to/gpus.md", "## 3. Start it")[1:]:
        assert str(overlay[field.strip("`")]) == value.strip("`")


def rounded(parameters: int, like: str) -> str:
    unit = {"M": 10**6, "B": 10**9}[like[-1]]
    return f"{parameters / unit:.{len(like[:-1].partition('.')[2])}f}{like[-1]}"


@pytest.mark.parametrize(
    "row", rows("paper-map.md", "LLaMA2-MoE: 32,000):\n")[1:], ids=lambda row: row[0]
)
def test_sizes_of_the_paper_map_are_those_of_the_presets(row):
    name, published, *ours = row
    preset = name.lower().replace("-", "_")
    if preset.startswith("swin"):
        pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    for column, text in zip(("top_2", "scmoe"), ours, strict=True):
        count = parameters.count(preset, parameters.ARCHITECTURES[column])["total"]
        assert rounded(count, text) == text, column
    assert published.partition(" ")[0] in ("", *parameters.PUBLISHED.values())


def test_routers_have_the_scores_and_rules_of_their_table():
    rules = {"by_sign": "by sign", "in_proportion": "in proportion"}
    for name, scores, _, bias, loss, _ in rows("routers.md", "# Routers")[1:]:
        scoring = ROUTERS[name.strip("`")](load("quickstart", ["moe.bias_rate=0.5"]))
        assert scores == ("softmax" if scoring.score is softmax else scoring.score.__name__)
        assert rules[scoring.rule.__name__] in bias
        assert name == "`softmax`" or f"rate {scoring.rate:g}" in bias
        assert loss == ("mean over sequences" if scoring.per_sequence else "of the global batch")
