"""This module draws configurations for the fuzz test: from each field's type and range, and from beyond both."""

from typing import Any

from hypothesis import strategies as st

from scmoe.config.fields import Config
from scmoe.config.leaves import Leaf, leaves

LEAVES = {leaf.key: leaf for leaf in leaves(Config())}
# trainer.compile: a compiler takes longer than a case may. The others: cases keep to their folder and to the limits.
NOT_DRAWN = {"trainer.compile", "runs_dir", "data.cache_dir"}
NOT_DRAWN |= {"trainer.max_steps", "trainer.max_memory_gib", "trainer.max_step_s"}
NOT_DRAWN |= {key for key in LEAVES if key.startswith("model.latent.")}  # each alone is refused
MOST = {"model.layers": 16, "data.workers": 2}  # below the ends of their ranges, which take minutes to build or start
NUMBERS = ["0", "-1", "1", "2", "3", "7", "8", "1e-30", "0.5", "1e300", "-1e300", "nan", "inf", "1e400", "10" * 30]
ODD = ["", "null", "true", "yes", "[]", "[1, 2]", "{a: 1}", "${oc.env:HOME}", "???", "!!python/name:os.system", "&a b"]
ODD += [
    "../x",
    "/proc/nowhere",
    "\0",
    "é" * 200,
    "a\nb",
    "'",
    '"',
    ": ",
    "#",
    "%s%n",
    "0x10",
    "1_000",
    "--help",
    "\u202e",
]


def usual(leaf: Leaf) -> st.SearchStrategy[str]:
    """Returns texts that the type and the range of a field allow."""
    if leaf.choices:
        return st.sampled_from([str(choice) for choice in leaf.choices])
    if leaf.type is bool:
        return st.sampled_from(["true", "false"])
    low, high = (leaf.range.least, leaf.range.most) if leaf.range else (0, 2)
    high = MOST.get(leaf.key, high)
    if int in leaf.types:
        small = st.integers(int(low), int(min(high, low + 64))).map(str)
        return small | st.sampled_from([str(int(low)), str(int(high)), str(int(high) - 1), str(int(high) // 3)])
    if float in leaf.types:
        return st.floats(low, high).map(repr)
    return st.sampled_from(["x", "null", "a-b_c", "configs", "README.md"])


def value(leaf: Leaf) -> st.SearchStrategy[str]:
    """Returns texts for a field; nine of ten are such as it allows."""
    beyond = st.sampled_from([*NUMBERS, *ODD]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    return st.integers(0, 9).flatmap(lambda i: usual(leaf) if i else beyond)


@st.composite
def overrides(draw: Any) -> list[str]:
    """Draws one to four overrides of different keys."""
    keys = draw(st.lists(st.sampled_from(sorted(LEAVES.keys() - NOT_DRAWN)), min_size=1, max_size=4, unique=True))
    return [f"{key}={draw(value(LEAVES[key]))}" for key in keys]
