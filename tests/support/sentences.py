"""This module writes texts of made-up sentences, and finds the folder of the paper's tasks."""

import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
WORDS = [
    "state",
    "union",
    "people",
    "congress",
    "nation",
    "labor",
    "public",
    "treasury",
    "nations",
    "peace",
    "land",
]
DATA = Path(os.environ.get("SCMOE_EVAL_DATA", ROOT.parent / "shared" / "data" / "eval"))
NO_DATA = (
    f"the folder of the paper's tasks, {DATA}, does not exist; SCMOE_EVAL_DATA names another one"
)


def sentences(number: int, seed: int = 0) -> str:
    """Return sentences of 6 to 9 words, which begin with a capital and end with a full stop."""
    draw = np.random.default_rng(seed)
    drawn = (draw.choice(WORDS, draw.integers(6, 10)) for _ in range(number))
    return " ".join(" ".join(words).capitalize() + "." for words in drawn)
