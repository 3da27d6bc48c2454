"""The list of architectures has every row of the paper's tables, and every model family is tested
with all rows."""

import pytest

from scmoe.config.fields import Config
from scmoe.config.leaves import leaves
from scmoe.config.load import load_config
from scmoe.config.registry import ARCHITECTURES
from tests.support import cases
from tests.support.architectures import (
    BETWEEN_BLOCKS,
    EVERY_BLOCK,
    LANGUAGE_WITH_ORACLE,
    SWIN_ON_RANKS,
    SWIN_WITH_ORACLE,
    TABLES,
    overrides,
)

NAMED = (  # Tables 1 to 7 and A.7
    *("top-1", "top-2", "top-3", "shared-direct_add", "shared-cg1", "shared-cg2"),
    *(
        "pos1",
        "pos2",
        "pos3",
        "l0-pos1",
        "pos1-direct_add",
        "pos2-direct_add",
        "pos3-direct_add",
        "pos2-cg2",
    ),
    *("scmoe-2", "dgmoe", "dgmoe-share", "double-top-1"),
)


def test_every_row_of_the_tables_is_listed_exactly_once():
    assert set(TABLES) == set(NAMED)
    configs = [load_config(None, overrides(words)) for words in (TABLES | EVERY_BLOCK).values()]
    assert all(config not in configs[:i] for i, config in enumerate(configs))


@pytest.mark.parametrize("field", ["architecture", "position", "combine"])
def test_every_choice_of_the_config_is_in_a_row(field):
    choices = next(leaf.choices for leaf in leaves(Config()) if leaf.key == f"moe.{field}")
    # other tests register more
    choices = ARCHITECTURES.built_in if field == "architecture" else choices
    seen = {
        getattr(load_config(None, overrides(words)).moe, field)
        for words in (TABLES | BETWEEN_BLOCKS).values()
    }
    assert seen == set(choices) - {"dense"}


def test_every_family_is_compared_for_every_row():
    language = TABLES | EVERY_BLOCK
    assert language.items() <= LANGUAGE_WITH_ORACLE.items(), (
        "a row of GPT or LLaMA is not compared with the oracle"
    )
    assert language.items() <= cases.ARCHITECTURES.items(), (
        "a row of GPT is not tested on two ranks"
    )
    llama = {f"llama, {name}": f"{words} {cases.LLAMA}" for name, words in language.items()}
    assert llama.items() <= cases.ARCHITECTURES.items(), "a row of LLaMA is not tested on two ranks"
    assert TABLES.items() <= SWIN_WITH_ORACLE.items(), (
        "a row of SwinV2 is not compared with the oracle"
    )
    assert TABLES.items() <= SWIN_ON_RANKS.items(), "a row of SwinV2 is not tested on two ranks"
