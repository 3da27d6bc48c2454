"""This machine as a profile, measured in about a minute: `cluster=measure`.

    attained, peak    a product of the size of an MLP's; on a CPU the peak is what is attained
    memory            a copy of a large tensor, whose bytes are read and written
    link              an all-to-all of two processes at two sizes: its rate and its latency
    tax               products beside exchanges: what they lose of the time that exchanges take
    launch            a kernel on a tensor of a few numbers

On a CPU two processes with one thread each exchange rows through gloo; all are on one node. On
cards there is one process for each, through NCCL. What is not measured stays a guess: attention,
layout, halves.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe.clusters.profile import KEYS, NETWORK, Profile, Value
from scmoe.config.leaves import ConfigError
from scmoe.estimate.model_cost import peak_tflops

ROUNDS = 9
WARM_UP = 2
SMALL, LARGE = 2**16, 2**24  # bytes of a rank in an exchange
CARD_SIZES = 8192, 4096, 4096  # of a product: rows, width, columns
HOST_SIZES = 1024, 512, 2048
LIMIT_S = 600.0
GUESSED = {"attention": 1.5, "moe": 0.3, "copy": 0.15, "halves": 1.05}  # as in configs/cluster/
BESIDE = 4  # exchanges, while products run


def measure() -> Profile:
    """Return the profile of this machine. ConfigError: a process has ended without a result."""
    on_cards = torch.cuda.is_available()
    ranks = max(1, torch.cuda.device_count()) if on_cards else 2
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        context = multiprocessing.get_context("spawn")
        results: Any = context.SimpleQueue()
        processes = [
            context.Process(target=_rank, args=(rank, ranks, store, results), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        wait_for(processes)
        if any(process.exitcode for process in processes):
            codes = ", ".join(str(process.exitcode) for process in processes)
            raise ConfigError(
                f"cluster is measure: the processes that measure ended with codes {codes}. Name a"
                " profile instead"
            )
        numbers: dict[str, float] = results.get()
    values = {key: Value(allowed.default or 0.0, "guess") for key, allowed in KEYS.items()}
    values |= {key: Value(number, "guess") for key, number in GUESSED.items()}
    values |= {key: Value(number, "measured") for key, number in numbers.items()}
    kept = {key: value for key, value in values.items() if not key.startswith(NETWORK)}
    precision = "bf16-mixed" if on_cards else "32-true"
    return Profile("measure", precision, ranks, ranks, kept, measured_bytes=(SMALL, LARGE))


def wait_for(processes: Sequence[Any]) -> None:
    """Wait for processes. The others are ended if one fails, or after LIMIT_S."""
    deadline = time.monotonic() + LIMIT_S
    while any(process.is_alive() for process in processes):
        failed = any(process.exitcode for process in processes)
        if failed or time.monotonic() > deadline:
            for process in processes:
                process.terminate()
        wait([process.sentinel for process in processes if process.is_alive()], timeout=1.0)
    for process in processes:
        process.join()


def _rank(rank: int, ranks: int, store: str, results: Any) -> None:
    """Measure on one of the ranks; the first one puts the numbers into the queue."""
    on_cards = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_cards else torch.device("cpu")
    if on_cards:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if on_cards else "gloo"
    dist.init_process_group(
        backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks
    )
    numbers = numbers_of(device, ranks)
    dist.barrier()
    if rank == 0:
        results.put(numbers)
    dist.destroy_process_group()


def numbers_of(device: torch.device, ranks: int) -> dict[str, float]:
    """Return what is measured, by key of a profile. Every rank must call it."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows, width, columns = HOST_SIZES if device.type == "cpu" else CARD_SIZES
    x_RD = torch.randn(rows, width, device=device, dtype=dtype)
    w_DF = torch.randn(width, columns, device=device, dtype=dtype)
    large = torch.empty(LARGE * 4, device=device, dtype=torch.uint8)
    copied = torch.empty_like(large)
    few = torch.zeros(8, device=device)

    product_s = seconds_of(lambda: x_RD @ w_DF, device)
    copy_s = seconds_of(lambda: copied.copy_(large), device)
    launch_s = seconds_of(lambda: [few.add_(1) for _ in range(100)], device) / 100
    attained = 2 * rows * width * columns / product_s / 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = max(attained, peak_tflops(name, "bf16-mixed") or 0.0)
    numbers = {
        "peak_tflops": peak,
        "attained": attained / peak,
        "memory_gb_s": 2 * large.numel() / copy_s / 1e9,
        "launch_us": launch_s * 1e6,
        "links.node.gb_s": 1e5,
        "links.node.attained": 1.0,
        "links.node.latency_us": 0.0,
    }
    if ranks > 1:
        numbers |= exchange_numbers(device, ranks, lambda: x_RD @ w_DF, product_s)
    return numbers


def exchange_numbers(
    device: torch.device, ranks: int, product: Callable[[], Any], product_s: float
) -> dict[str, float]:
    """Return the rate and the latency of an exchange, and what it takes from products beside it."""
    small, large = (
        torch.zeros(nbytes // ranks * ranks, device=device, dtype=torch.uint8)
        for nbytes in (SMALL, LARGE)
    )
    seconds = [seconds_of(partial(exchange, rows), device) for rows in (small, large)]
    travels = (ranks - 1) / ranks
    rate = (large.numel() - small.numel()) * travels / max(seconds[1] - seconds[0], 1e-9)
    latency = max(0.0, seconds[0] - small.numel() * travels / rate)
    products = max(1, round(BESIDE * seconds[1] / product_s))

    def beside() -> None:
        works = [start(large) for _ in range(BESIDE)]
        for _ in range(products):
            product()
        for work in works:
            work.wait()

    alone = max(products * product_s, BESIDE * seconds[1])
    hidden = min(products * product_s, BESIDE * seconds[1])
    lost = seconds_of(beside, device) - alone
    return {
        "links.node.gb_s": rate / 1e9,
        "links.node.attained": 1.0,
        "links.node.latency_us": latency * 1e6,
        "tax": min(1.0, max(0.0, lost / hidden)),
    }


def start(rows: Tensor) -> Any:
    """Start an all-to-all of a rank's rows."""
    received = torch.empty_like(rows)
    return dist.all_to_all_single(received, rows, async_op=True)


def exchange(rows: Tensor) -> None:
    start(rows).wait()


def seconds_of(f: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a call, after two that are not counted."""
    times = []
    for _ in range(WARM_UP + ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return median(times[WARM_UP:])
