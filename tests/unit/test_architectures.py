"""The list of the tables' architectures is whole, and every family is compared with oracle and ranks for all of it."""

from __future__ import annotations

import pytest

from scmoe.config import Config, load
from scmoe.config_check import leaves
from tests.architectures import EVERY_BLOCK, TABLES, overrides

NAMED = (  # Tables 1 to 7 and A.7
    *("top-1", "top-2", "top-3", "shared-direct_add", "shared-cg1", "shared-cg2"),
    *("pos1", "pos2", "pos3", "l0-pos1", "pos1-direct_add", "pos2-direct_add", "pos3-direct_add", "pos2-cg2"),
    *("scmoe-2", "dgmoe", "dgmoe-share"),
)


def test_every_row_of_the_tables_is_there_and_none_twice():
    assert set(TABLES) == set(NAMED)
    configs = [load(None, overrides(words)) for words in (TABLES | EVERY_BLOCK).values()]
    assert all(config not in configs[:i] for i, config in enumerate(configs))


@pytest.mark.parametrize("field", ["architecture", "position", "combine"])
def test_every_choice_of_the_config_is_in_a_row(field):
    choices = next(leaf.choices for leaf in leaves(Config()) if leaf.key == f"moe.{field}")
    seen = {getattr(load(None, overrides(words)).moe, field) for words in TABLES.values()}
    assert seen == set(choices) - {"dense"}


def test_every_family_is_compared_for_every_row():
    from tests.distributed import test_ep_equality
    from tests.unit import test_reference_equality

    language = TABLES | EVERY_BLOCK
    assert language.items() <= test_reference_equality.ARCHITECTURES.items(), "GPT and LLaMA with the oracle"
    assert language.items() <= test_ep_equality.ARCHITECTURES.items(), "GPT on two ranks"
    llama = {f"llama, {name}": f"{words} {test_ep_equality.LLAMA}" for name, words in language.items()}
    assert llama.items() <= test_ep_equality.ARCHITECTURES.items(), "LLaMA on two ranks"
    assert {f"{name}, EP 2" for name in (*language, *llama)} <= test_ep_equality.TWO.keys()
    pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    from tests.distributed import test_swin_equality
    from tests.unit import test_swin

    assert TABLES.items() <= test_swin.ARCHITECTURES.items(), "SwinV2 with the oracle"
    assert TABLES.items() <= test_swin_equality.ARCHITECTURES.items(), "SwinV2 on two ranks"
