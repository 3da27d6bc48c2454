"""Every test process has one thread: tests run in parallel, and sums have the same order
everywhere."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from experiments.engine.ranks import PRELOADED

# Tests import these in ranks. Each would take a tenth of a second there, or more.
PRELOADED.extend(
    [
        "scmoe.training.assembly.start",
        "scmoe.training.run.train",
        "pytest",
        "tests.support.commands",
    ]
)
pytest.register_assert_rewrite("tests.support")  # so that a failing assert there shows its values
torch.set_num_threads(1)
settings.register_profile(
    "scmoe", deadline=None, max_examples=50
)  # the machine is shared: a slow example is not a failure
settings.load_profile("scmoe")


LONG = (
    "test_readme.py",
    "test_reproduce.py",
    "test_sweep_trials.py",
)  # a file is one worker's, so they begin first


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def no_traces_of_a_launcher():
    """Remove what a Trainer in this process has set, or every program that a later test starts
    would take its port."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


def pytest_terminal_summary(terminalreporter):
    """Print how many training steps were checked on fake tensors of a device
    (tests/unit/test_fake_cuda.py)."""
    passed = terminalreporter.getreports("passed")
    steps = sum(
        value
        for report in passed
        for name, value in report.user_properties
        if name == "fake_cuda_steps"
    )
    if steps:
        terminalreporter.write_line(f"fake_cuda: {steps} training steps checked")
