"""Any configuration ends in one line that names a key, or trains. `pytest -m fuzz` draws 500."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from scmoe.config.fields import Config
from scmoe.config.leaves import Leaf, leaves
from tests.support.commands import ROOT, environment
from tests.support.forked import python

pytestmark = [pytest.mark.faults]

ENDS_WITHIN_S = 240.0  # what takes longer hangs
GROWTH_GIB = 4.0
LIMITS = [f"trainer.max_memory_gib={GROWTH_GIB / 2}", "trainer.max_step_s=2"]
FOUND: Counter[str] = Counter()
REFUSED_S: list[float] = []  # on a machine that may do other work, so it is shown and not asserted


# ---------------------------------------------------------------------- what is drawn

LEAVES = {leaf.key: leaf for leaf in leaves(Config())}
# trainer.compile: a compiler takes longer than a case may. The others: cases keep to their folder
# and to the limits.
NOT_DRAWN = {"trainer.compile", "runs_dir", "data.cache_dir"}
NOT_DRAWN |= {"trainer.max_steps", "trainer.max_tokens"}
NOT_DRAWN |= {"trainer.max_memory_gib", "trainer.max_step_s"}
NOT_DRAWN |= {key for key in LEAVES if key.startswith("model.latent.")}  # each alone is refused
MOST = {
    "model.layers": 16,
    "data.workers": 2,
}  # below the ends of their ranges, which take minutes to build or start
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "8",
    "1e-30",
    "0.5",
    "1e300",
    "-1e300",
    "nan",
    "inf",
    "1e400",
    "10" * 30,
]
ODD = [
    *(
        "",
        "null",
        "true",
        "yes",
        "[]",
        "[1, 2]",
        "{a: 1}",
        "${oc.env:HOME}",
        "???",
        "!!python/name:os.system",
        "&a b",
    ),
    *(
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
    ),
    *("--help", "\u202e"),
]


def usual(leaf: Leaf) -> st.SearchStrategy[str]:
    """Return texts that the type and the range of a field allow."""
    if leaf.choices:
        return st.sampled_from([str(choice) for choice in leaf.choices])
    if leaf.type is bool:
        return st.sampled_from(["true", "false"])
    low, high = (leaf.range.least, leaf.range.most) if leaf.range else (0, 2)
    high = MOST.get(leaf.key, high)
    if int in leaf.types:
        small = st.integers(int(low), int(min(high, low + 64))).map(str)
        return small | st.sampled_from(
            [str(int(low)), str(int(high)), str(int(high) - 1), str(int(high) // 3)]
        )
    if float in leaf.types:
        return st.floats(low, high).map(repr)
    return st.sampled_from(["x", "null", "a-b_c", "configs", "README.md"])


def value(leaf: Leaf) -> st.SearchStrategy[str]:
    """Return texts for a field; nine of ten are such as it allows."""
    beyond = st.sampled_from([*NUMBERS, *ODD]) | st.text(
        st.characters(exclude_categories=["Cs"]), max_size=12
    )
    return st.integers(0, 9).flatmap(lambda i: usual(leaf) if i else beyond)


@st.composite
def overrides(draw: Any) -> list[str]:
    """Draw one to four overrides of different keys."""
    keys = draw(
        st.lists(
            st.sampled_from(sorted(LEAVES.keys() - NOT_DRAWN)), min_size=1, max_size=4, unique=True
        )
    )
    return [f"{key}={draw(value(LEAVES[key]))}" for key in keys]


# ---------------------------------------------------------------------- what comes of it


def check(words: list[str]) -> None:
    """Train two steps of a small config with these overrides in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        own = [
            f"runs_dir={folder}/runs",
            f"data.cache_dir={folder}/cache",
            "trainer.max_steps=2",
            *LIMITS,
        ]
        env = environment(HF_HUB_OFFLINE="1", SCMOE_LIMIT_GIB=str(GROWTH_GIB))
        before = time.monotonic()
        arguments = (
            "-m",
            "tests.support.limited_train",
            str(ROOT / "configs/debug.yaml"),
            *own,
            *words,
        )
        code, out, err = python(*arguments, cwd=Path(folder), env=env, timeout_s=ENDS_WITHIN_S)
        seconds = time.monotonic() - before
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err, err
    if code == 0:
        loss = json.loads(out)["val_loss"]
        assert math.isfinite(loss) if loss is not None else "trainer.limit_val_batches=0" in words
        FOUND["trained"] += 1
    else:
        assert code == 2 and len(said) == 1, (code, err)
        assert any(key in said[0] for key in LEAVES) or any(
            word.partition("=")[0] in said[0] for word in words
        ), said
        FOUND["refused"] += 1
        REFUSED_S.append(seconds)


def fuzz(examples: int) -> None:
    FOUND.clear()
    REFUSED_S.clear()
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run = settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=quiet,
        database=None,
    )
    seed(1)(run(given(overrides())(check)))()
    print(
        f"fuzz: {examples} configurations: {FOUND['trained']} trained, {FOUND['refused']} refused"
        " in one line"
    )
    print(
        f"fuzz: a refusal took {median(REFUSED_S):.1f} s, at most {max(REFUSED_S):.1f} s, the start"
        " of Python included"
    )
    assert (
        FOUND.total() >= 0.9 * examples
        and FOUND["trained"] > 0.1 * examples
        and FOUND["refused"] > 0.1 * examples
    )


@pytest.mark.representative
@pytest.mark.timeout(600)
def test_drawn_configurations_train_or_are_refused_in_one_line():
    fuzz(8)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_five_hundred_drawn_configurations_train_or_are_refused_in_one_line():
    fuzz(500)
