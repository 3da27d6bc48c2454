"""Any configuration ends in one line that names a key, or trains. `pytest -m fuzz` draws 500."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support.commands import ROOT
from tests.support.drawn_configs import LEAVES, overrides
from tests.support.forked import python

pytestmark = [pytest.mark.faults]

ENDS_WITHIN_S = 240.0  # what takes longer hangs
GROWTH_GIB = 4.0
LIMITS = [f"trainer.max_memory_gib={GROWTH_GIB / 2}", "trainer.max_step_s=2"]
FOUND: Counter[str] = Counter()
REFUSED_S: list[float] = []  # on a machine that may do other work, so it is shown and not asserted


def check(words: list[str]) -> None:
    """Trains two steps of a small config with these overrides in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"runs_dir={folder}/runs", f"data.cache_dir={folder}/cache", "trainer.max_steps=2", *LIMITS]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "PYTEST_", "MASTER_"))}
        env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env |= {"PYTHONPATH": str(ROOT), "SCMOE_LIMIT_GIB": str(GROWTH_GIB)}
        before = time.monotonic()
        arguments = "-m", "tests.support.limited_train", str(ROOT / "configs/debug.yaml"), *own, *words
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
        assert any(key in said[0] for key in LEAVES) or any(word.partition("=")[0] in said[0] for word in words), said
        FOUND["refused"] += 1
        REFUSED_S.append(seconds)


def fuzz(examples: int) -> None:
    FOUND.clear()
    REFUSED_S.clear()
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run = settings(
        max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=quiet, database=None
    )
    seed(1)(run(given(overrides())(check)))()
    print(f"fuzz: {examples} configurations: {FOUND['trained']} trained, {FOUND['refused']} refused in one line")
    print(
        f"fuzz: a refusal took {median(REFUSED_S):.1f} s, at most {max(REFUSED_S):.1f} s, the start of Python included"
    )
    assert FOUND.total() >= 0.9 * examples and FOUND["trained"] > 0.1 * examples and FOUND["refused"] > 0.1 * examples


@pytest.mark.representative
@pytest.mark.timeout(600)
def test_drawn_configurations_train_or_are_refused_in_one_line():
    fuzz(8)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_five_hundred_drawn_configurations_train_or_are_refused_in_one_line():
    fuzz(500)
