"""On shaped links each rank has its own network namespace, no rate is exceeded, and nothing is left
afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from experiments.engine import links
from experiments.engine.ranks import run_ranks

WHY_NOT = links.why_not()
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"links cannot be shaped here: {WHY_NOT}"),
]
MEGABYTES, MBIT = 1, 80.0


def exchange(rank: int, world_size: int) -> float:
    """Return the seconds of an all-to-all in which each rank sends a megabyte to the other,
    barriers included.

    It runs once without a rate, then with one; the seconds are those with a rate."""
    dist.init_process_group("gloo")
    rows = torch.full((2 * MEGABYTES * 2**20 // 4,), float(rank))
    for rate in (None, MBIT):
        links.set_rate(rate)
        received = torch.empty_like(rows)
        start = time.perf_counter()
        dist.barrier()
        dist.all_to_all_single(received, rows)
        dist.barrier()
        assert received.unique().tolist() == [0.0, 1.0]
    return time.perf_counter() - start


def gather_on_one(rank: int, world_size: int) -> float:
    """Return the seconds in which all other ranks send a megabyte to rank 0, barriers included."""
    dist.init_process_group("gloo")
    links.set_rate(MBIT)
    rows = torch.zeros(MEGABYTES * 2**20 // 4)
    received = [torch.empty_like(rows) for _ in range(world_size)] if rank == 0 else None
    dist.barrier()
    start = time.perf_counter()
    dist.gather(rows, received)
    dist.barrier()
    return time.perf_counter() - start


def hang(rank: int, world_size: int) -> None:
    print(f"up {os.getpid()}", flush=True)
    time.sleep(600)


def inside(function: str, ranks: int = 2) -> list[str]:
    """Return the command of a program that enters its own network and runs a function of this file
    on some ranks."""
    code = (
        "import gc, sys, json; gc.disable(); "
        "from experiments.engine import links; links.enter(); "
        "from experiments.engine.ranks import PRELOADED, run_ranks; "
        "PRELOADED[2:] = ['scmoe.lightning.seam.launch']; "  # what a rank imports
        f"from tests.experiments.engine.test_links import {function}; "
        f"print(json.dumps(run_ranks({function}, {ranks}, own_links=True)))"
    )
    return [sys.executable, "-c", code, code]


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


@pytest.mark.parametrize(
    "user",
    [
        pytest.param(False, id="as this user"),
        pytest.param(
            True, id="in a user namespace", marks=pytest.mark.faults
        ),  # slow, and as the other
    ],
)
def test_a_link_carries_no_more_than_its_rate(user, monkeypatch):
    if user:  # root can use one, too
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--net", "true"],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    before = interfaces()
    command = inside("exchange")
    if user:
        command = ["unshare", "--user", "--map-root-user", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # the bucket's burst passes without delay
    least = (MEGABYTES * 2**20 * 8 - 128 * 1024 * 8) / (MBIT * 1e6)
    seconds = json.loads(done.stdout.splitlines()[-1])
    assert min(seconds) >= least, seconds
    assert interfaces() == before


@pytest.mark.faults
def test_a_rank_receives_no_more_than_its_rate_from_several():
    done = subprocess.run(inside("gather_on_one", 3), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    least = (2 * MEGABYTES * 2**20 * 8 - 128 * 1024 * 8) / (MBIT * 1e6)
    assert json.loads(done.stdout.splitlines()[-1])[0] >= least


@pytest.mark.faults
def test_nothing_is_left_when_the_program_is_killed():
    before = interfaces()
    program = subprocess.Popen(inside("hang"), stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    pids = [int(program.stdout.readline().split()[1]) for _ in range(2)]
    namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
    assert len(namespaces | {os.readlink("/proc/self/ns/net")}) == 3, (
        "each rank has its own network"
    )
    program.send_signal(signal.SIGKILL)
    program.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank still runs after the end of the program"
        time.sleep(0.1)
    assert interfaces() == before


def test_ranks_with_their_own_links_require_a_program_in_its_own_network():
    with pytest.raises(AssertionError):
        run_ranks(exchange, 2, own_links=True)
