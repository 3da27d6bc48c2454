"""Every test process has one thread: tests run in parallel, and sums have the same order
everywhere."""

from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("tests.support")  # so that a failing assert there shows its values

LONG = (  # a file is one worker's, so these begin first
    *("test_readme.py", "test_table.py", "test_trials.py", "test_loggers.py"),
    *("test_ddp_features.py", "test_fake_cuda.py", "test_wandb_logger_faults.py"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    if session.config.pluginmanager.hasplugin("dsession"):
        return (yield)  # this process only hands out tests, so it needs no torch

    import tests.support.begin_imports
    import tests.support.settings

    try:
        return (yield)
    finally:
        import tests.support.end_imports  # noqa: F401


@pytest.fixture(autouse=True)
def no_traces_of_a_launcher():
    """Remove what a Trainer in this process has set, or every program that a later test starts
    would take its port. End its process group, or a later test could make none."""
    import torch.distributed as dist

    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def one_thread():
    """Set the number of threads before and after each test. A Trainer in this process sets its own
    for good, and on busy cores small products of two threads take several times as long."""
    import torch

    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """Print how many training steps were checked on fake tensors of a device
    (tests/training/test_fake_cuda.py)."""
    passed = terminalreporter.getreports("passed")
    steps = sum(
        value
        for report in passed
        for name, value in report.user_properties
        if name == "fake_cuda_steps"
    )
    if steps:
        terminalreporter.write_line(f"fake_cuda: {steps} training steps checked")
