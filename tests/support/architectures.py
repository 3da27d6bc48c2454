"""This module lists every architecture of the paper's tables as words of the config.

A word without a dot is a key of the section `moe`. `TABLES` has the rows of Tables 1 to 7 and of
A.7; a row with CG-1 has the name of its position alone.
"""

from collections.abc import Iterable
from typing import Any

import pytest

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
    "double-top-1": "architecture=dgmoe distinct_experts=false position=pos2",
    "dgmoe-share": "architecture=dgmoe_share position=pos2 model.layers=4",
}
EVERY_BLOCK = {  # LLaMA2-MoE, Table 2: the tap is always the block's own input, Pos-1
    "top-2-every-block": "architecture=top_k top_k=2 every=1",
    "shared-every-block": "architecture=shared_expert every=1",
    "scmoe-every-block": "position=pos1 every=1",
}
EVERY_FOURTH_BLOCK = {
    "top-2-every-fourth": "architecture=top_k top_k=2 every=4 model.layers=4",
    "shared-every-fourth": "architecture=shared_expert every=4 model.layers=4",
    "l0-pos1-every-fourth": "position=pos2 first_position=pos1 every=4 model.layers=8",
    "pos3-every-fourth": "position=pos3 every=4 model.layers=4",
    "dgmoe-every-fourth": "architecture=dgmoe every=4 model.layers=4",
}

BETWEEN_BLOCKS = {  # a block leaves an activation for the next one
    "pos2-every-block": "position=pos2 every=1 model.layers=3",
    "farskip": "architecture=farskip every=1 top_k=2 model.layers=3",
}
LATENT = (
    "model.attention=latent model.latent.kv_rank=8 model.latent.nope_dim=6 model.latent.rope_dim=4 "
    "model.latent.value_dim=5"
)
LATENT_ATTENTION = {  # LLaMA alone has it
    "latent": f"position=pos2 {LATENT}",
    "longcat": (
        f"position=pos2 top_k=2 tap_norm=shared combine=direct_add {LATENT} model.latent.q_rank=7 "
        "model.latent.scaled=true"
    ),
    "instella": (
        f"architecture=farskip every=1 top_k=2 {LATENT} model.latent.gated=true "
        "model.latent.yarn_factor=40 model.rope_theta=5e4"
    ),
    "latent-dense": f"architecture=dense {LATENT} model.latent.q_rank=8 model.latent.gated=true",
}
AFTER_NORM = {
    "top-2-after-norm": "architecture=top_k top_k=2 after_norm=true",
    "shared-after-norm": "architecture=shared_expert after_norm=true",
    "nvidia": "position=pos1 every=1 top_k=2 combine=direct_add after_norm=true",
    "dgmoe-after-norm": "architecture=dgmoe after_norm=true",
}

# One row for each wiring; other rows of the tables differ from one of these in top-k and
# coefficients.
KINDS = ("top-2", "shared-cg1", "pos1", "pos2", "pos3", "l0-pos1", "dgmoe", "dgmoe-share")
SLOW = TABLES.keys() - set(KINDS)

# The architectures that each comparison goes through. Those of GPT and LLaMA on several ranks:
# tests/support/cases.py.
LANGUAGE_WITH_ORACLE = {
    **TABLES,
    **EVERY_BLOCK,
    **EVERY_FOURTH_BLOCK,
    **BETWEEN_BLOCKS,
    **AFTER_NORM,
    "pos2-every-block-cg2-reads-tap": (
        "position=pos2 every=1 top_k=3 combine=cg2 coefficient_input=tap after_norm=true"
    ),
    "shared-top-2": "architecture=shared_expert top_k=2",
    "shared-top-3": "architecture=shared_expert top_k=3",
    "pos1-cg2": "position=pos1 combine=cg2",
    "pos3-cg2": "position=pos3 combine=cg2",
    "pos1-reads-tap": "position=pos1 coefficient_input=tap",
    "pos2-reads-tap-cg2": "position=pos2 coefficient_input=tap combine=cg2",
    "pos1-shared-norm": "position=pos1 tap_norm=shared",
    "pos2-shared-norm": "position=pos2 tap_norm=shared",
    "pos3-shared-norm-reads-tap": "position=pos3 tap_norm=shared coefficient_input=tap",
    "scmoe-every-block-top-3": "position=pos1 every=1 top_k=3",
    "scmoe-2-pos1": "position=pos1 top_k=2",
    "scmoe-2-pos3": "position=pos3 top_k=2",
    "dgmoe-pos1": "architecture=dgmoe position=pos1",
    "dgmoe-pos3": "architecture=dgmoe position=pos3",
    "dgmoe-shared-norm": "architecture=dgmoe position=pos2 tap_norm=shared",
    "dgmoe-every-block": "architecture=dgmoe position=pos1 every=1",
    "dgmoe-share-of-three": "architecture=dgmoe_share position=pos3 model.layers=6",
}
SWIN_WITH_ORACLE = {
    "dense": "architecture=dense",
    **TABLES,
    **EVERY_BLOCK,
    "pos2-every-block": "position=pos2 every=1",
    "shared-cg2-top-2": "architecture=shared_expert combine=cg2 top_k=2",
    "pos2-cg2-reads-tap": "position=pos2 combine=cg2 coefficient_input=tap",
    "scmoe-2-pos1": "position=pos1 top_k=2",
    "dgmoe-pos1": "architecture=dgmoe position=pos1",
    "dgmoe-pos3": "architecture=dgmoe position=pos3",
}
SWIN_ON_RANKS = {"dense": "architecture=dense", **TABLES}


def overrides(words: str) -> list[str]:
    """Return words such as `top_k=2 model.layers=4` as the command line takes them."""
    keys = {word: word.partition("=")[0] for word in words.split()}
    return [
        word if "." in key or key == "extensions" else f"moe.{word}" for word, key in keys.items()
    ]


def with_marks(names: Iterable[str]) -> list[Any]:
    """Return the names as parameters of a test; those of SLOW are in `make test-faults` alone."""
    return [pytest.param(name, marks=pytest.mark.faults if name in SLOW else ()) for name in names]
