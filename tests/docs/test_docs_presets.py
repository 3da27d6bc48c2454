"""Overrides that pages offer to copy: they load, and give the wiring that the row names."""

import re
from pathlib import Path

from scmoe.blocks.wirings import WIRINGS, Wiring
from scmoe.config.derived import resolve_wiring
from scmoe.config.load import load_config

DOCS = Path(__file__).parents[2] / "docs"
MODELS = {  # a model's name in the tables: its wiring, and its preset
    "ScMoE": ("scmoe", "quickstart"),
    "LongCat-Flash": ("longcat", "model/longcat_flash"),
    "NVIDIA": ("nvidia", "model/nvidia_shortcut"),
    "NousResearch": ("nous", "model/nous"),
    "FarSkip": ("farskip", "model/instella_moe"),
}


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading; the first row is the table's head."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    (table,) = re.findall(r"(?:^\|.*\n)+", text, re.M)[:1]
    lines = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table.splitlines()]
    return [
        [cell.strip() for cell in line] for line in lines if not set("".join(line)) <= set(" -")
    ]


def words(cell: str) -> list[str]:
    """Return the overrides in the backticks of a cell."""
    return [word for text in re.findall(r"`([^`]*)`", cell) for word in text.split() if "=" in word]


# ---------------------------------------------------------------------- shortcuts.md


def test_a_row_of_the_wirings_has_the_defaults_of_a_configuration():
    assert resolve_wiring(load_config(None)) == Wiring() == WIRINGS["scmoe"]
    for row in WIRINGS.values():
        assert resolve_wiring(load_config(None, row.overrides)) == row


def test_the_overrides_and_the_preset_of_each_shortcut_are_a_row_of_the_wirings():
    table = rows("shortcuts.md", "## How to get each one")[1:]
    assert [row[0] for row in table] == list(MODELS)
    for name, overrides, call, file in table:
        row, preset = MODELS[name]
        assert f'shortcut="{row}"' in call
        assert resolve_wiring(load_config("quickstart", words(overrides))) == WIRINGS[row], name
        assert resolve_wiring(load_config(preset)) == WIRINGS[row], name
        assert file == "the same" or (DOCS.parent / file.strip("`")).exists()


def test_overrides_of_the_configuration_page_load():
    """Words in one pair of backticks go together, except those that name a file of the user's."""
    for _, cell in rows("configuration.md", "## Overrides")[1:]:
        for text in re.findall(r"`([^`]*=[^`]*)`", cell):
            if "my_package" not in text and "strategy.ep_size` times" not in text:
                load_config("quickstart", [word for word in text.split() if "=" in word])
