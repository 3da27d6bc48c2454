"""Overrides that pages offer to copy: they load, and give the wiring that the row names."""

import re
from pathlib import Path

import pytest

from experiments.bench.pairs import WIRINGS
from scmoe.config.fields import Config
from scmoe.config.load import load

DOCS = Path(__file__).parents[2] / "docs"
PRESETS = {  # a row of the page of shortcuts: its preset
    "ScMoE": "quickstart",
    "LongCat-Flash": "model/longcat_flash",
    "NVIDIA": "model/nvidia_shortcut",
    "NousResearch": "model/nous",
    "FarSkip": "model/instella_moe",
}
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


def words(cell: str) -> list[str]:
    """Return the overrides in the backticks of a cell."""
    return [word for text in re.findall(r"`([^`]*)`", cell) for word in text.split() if "=" in word]


def wiring(config: Config) -> dict[str, object]:
    fields = [
        key for key in WIRING if config.moe.architecture != "farskip" or key not in NOT_IN_FARSKIP
    ]
    return {key: getattr(config.moe, key) for key in fields}


def test_the_overrides_of_each_shortcut_give_the_wiring_of_its_preset():
    for name, overrides, _ in rows("shortcuts.md", "## How to get each one")[1:]:
        assert wiring(load("quickstart", words(overrides))) == wiring(load(PRESETS[name])), name


@pytest.mark.parametrize(
    ("row", "name"), [("nvidia", "NVIDIA"), ("nous", "NousResearch"), ("farskip", "FarSkip")]
)
def test_a_row_of_the_bench_has_the_wiring_of_its_preset(row, name):
    assert wiring(load("quickstart", ["moe.every=1", *WIRINGS[row]])) == wiring(load(PRESETS[name]))


def test_overrides_of_the_configuration_page_load():
    """Words in one pair of backticks go together, except those that name a file of the user's."""
    for _, cell in rows("configuration.md", "## Overrides")[1:]:
        for text in re.findall(r"`([^`]*=[^`]*)`", cell):
            if "my_package" not in text and "strategy.ep_size` times" not in text:
                load("quickstart", [word for word in text.split() if "=" in word])
