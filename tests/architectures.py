"""Every architecture of the paper's tables, as words of the config, for the tests that go through all of them.

A word without a dot is a key of the section `moe`. Rows of Tables 1 to 7 and of A.7; those of CG-1 are called by their
position alone.
"""

from __future__ import annotations

TABLES = {
    "top-1": "architecture=top_k top_k=1",
    "top-2": "architecture=top_k top_k=2",
    "top-3": "architecture=top_k top_k=3",
    "shared-direct_add": "architecture=shared_expert combine=direct_add",
    "shared-cg1": "architecture=shared_expert combine=cg1",
    "shared-cg2": "architecture=shared_expert combine=cg2",
    "pos1": "position=pos1",
    "pos2": "position=pos2",
    "pos3": "position=pos3",
    "l0-pos1": "position=pos2 first_position=pos1 model.layers=4",
    "pos1-direct_add": "position=pos1 combine=direct_add",
    "pos2-direct_add": "position=pos2 combine=direct_add",
    "pos3-direct_add": "position=pos3 combine=direct_add",
    "pos2-cg2": "position=pos2 combine=cg2",
    "scmoe-2": "position=pos2 top_k=2",
    "dgmoe": "architecture=dgmoe position=pos2",
    "dgmoe-share": "architecture=dgmoe_share position=pos2 model.layers=4",
}
EVERY_BLOCK = {  # LLaMA2-MoE's, Table 2: there the tap is the block's own input, Pos-1, and no other
    "top-2-every-block": "architecture=top_k top_k=2 every=1",
    "shared-every-block": "architecture=shared_expert every=1",
    "scmoe-every-block": "position=pos1 every=1",
}


def overrides(words: str) -> list[str]:
    """`top_k=2 model.layers=4` as the command line wants it."""
    return [word if "." in word.partition("=")[0] else f"moe.{word}" for word in words.split()]
