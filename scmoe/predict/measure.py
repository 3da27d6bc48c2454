"""This machine as a profile, measured in about a minute: `cluster=measure`.

    attained, peak    a product of the size of an MLP's; the peak is the datasheet's where the card
                      is known, else what is attained
    memory            a copy of a large tensor, whose bytes are read and written
    link              an exchange of all ranks at two sizes: its rate and its latency
    tax               products beside exchanges: what they lose of the time that exchanges take
    launch            a kernel on a tensor of a few numbers

Memory is read: that of the smallest card, or a rank's share of this machine's or container's.
On a CPU two processes with one thread each exchange rows through gloo, the way a training does; all
are on one node. On cards there is one process for each, through NCCL. Every rank measures at the
same time, and the slowest one counts, as all wait for it. A single card exchanges nothing. What is
not measured stays a guess: attention, layout, halves, all other KEYS.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import multiprocessing

from scmoe.config.leaves import ConfigError
from scmoe.models.model_cost import peak_tflops
from scmoe.parallel.dense.dense_auto import memory_of_rank
from scmoe.parallel.mesh import use_loopback_for_gloo
from scmoe.parallel.wire.all_to_all import Exchange, all_to_all
from scmoe.planning.clock import in_turn, median, seconds
from scmoe.predict.cluster import KEYS, NETWORK, Precision, Profile, Value

ROUNDS = 9
WARM_UP = 2
SMALL_BYTES, LARGE_BYTES = 2**16, 2**24  # bytes of a rank in an exchange
COPIED = 2**28  # bytes of a tensor, more than caches hold
CARD_SIZES = 8192, 4096, 4096  # of a product: rows, width, columns
HOST_SIZES = 1024, 512, 2048
EXCHANGE_TIMEOUT = timedelta(seconds=120)
GUESSED = {"attention": 1.0, "moe": 0.3, "copy": 0.15, "halves": 1.05}  # as in configs/cluster/
LAUNCHES = 100
EXCHANGES_BESIDE = 4  # exchanges, while products run
RANK_FAILURES = multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException
INSTEAD = "Name a profile of configs/cluster/ or a file instead"


class RankTimes(NamedTuple):
    """What a rank has measured. launches: of so many kernels. small, large: exchanges of these
    sizes. lost, hidden: by products beside exchanges, and how long exchanges ran beside them."""

    product: float
    copy: float
    launches: float
    small: float = 0.0
    large: float = 0.0
    lost: float = 0.0
    hidden: float = 0.0

    @property
    def tax(self) -> float:
        return min(1.0, max(0.0, self.lost / self.hidden)) if self.hidden else 0.0


def measure() -> Profile:
    """Return the profile of this machine. ConfigError: it cannot be measured."""
    on_cards, ranks = ranks_here()
    card = torch.cuda.get_device_name(0) if on_cards else None
    measured = profile_of(measured_by(ranks), on_cards, card)
    return replace(measured, memory_gb=memory_here(on_cards, ranks) / 1e9)


def memory_here(on_cards: bool, ranks: int) -> float:
    """Return the bytes that a rank may use."""
    if not on_cards:
        return memory_of_rank(torch.device("cpu"), ranks)
    return min(memory_of_rank(torch.device("cuda", rank), ranks) for rank in range(ranks))


def ranks_here() -> tuple[bool, int]:
    """Return whether this machine has cards, and how many ranks measure. ConfigError: its cards
    cannot exchange anything."""
    if not torch.cuda.is_available():
        return False, 2
    ranks = torch.cuda.device_count()
    if ranks > 1 and not dist.is_nccl_available():
        raise ConfigError(
            f"cluster is measure: {ranks} cards exchange rows through NCCL, which this torch does"
            f" not have. Install a torch with NCCL, or set CUDA_VISIBLE_DEVICES to one card."
            f" {INSTEAD}"
        )
    return True, ranks


def measured_by(ranks: int) -> list[RankTimes]:
    """Return what each rank measures. ConfigError: a process has ended without a result."""
    results: Any = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        try:
            multiprocessing.spawn(_rank, (ranks, store, results), ranks, daemon=True)
        except RANK_FAILURES as error:
            why = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"cluster is measure: a process that measures has ended without a result: {why}."
                f" {INSTEAD}"
            ) from error
    return [results.get() for _ in range(ranks)]


# ---------------------------------------------------------------------- from seconds to a profile


def profile_of(measured: Sequence[RankTimes], on_cards: bool, card: str | None) -> Profile:
    """Return the profile of the slowest rank. card: its name. ConfigError: a number is none that a
    machine can have, as other work has disturbed the measurement."""
    ranks = len(measured)
    slowest = RankTimes(*(max(of_ranks) for of_ranks in zip(*measured, strict=True)))
    values = {key: Value(allowed.default or 0.0, "guess") for key, allowed in KEYS.items()}
    values |= {key: Value(number, "guess") for key, number in GUESSED.items()}
    values |= device_values(slowest, on_cards, card)
    values["links.node.attained"] = Value(1.0, "given")  # of what an exchange attains
    if ranks == 1:  # no row ever leaves the card
        values["links.node.gb_s"] = Value(KEYS["links.node.gb_s"].high, "given")
    else:
        tax = max(seconds.tax for seconds in measured)
        values |= {**link_values(slowest, ranks), "tax": Value(tax, "measured")}
    kept = {key: value for key, value in values.items() if not key.startswith(NETWORK)}
    for key, (number, _) in kept.items():
        low, high = KEYS[key].low, KEYS[key].high
        if not low <= number <= high:
            raise ConfigError(
                f"cluster is measure: {key} was measured as {number:g}, which is not within"
                f" {low:g} and {high:g}. Stop other work and measure again. {INSTEAD}"
            )
    precision: Precision = "bf16-mixed" if on_cards else "32-true"
    return Profile("measure", precision, ranks, ranks, kept)


def device_values(slowest: RankTimes, on_cards: bool, card: str | None) -> dict[str, Value]:
    rows, width, columns = CARD_SIZES if on_cards else HOST_SIZES
    attained = 2 * rows * width * columns / slowest.product / 1e12
    values = {
        "memory_gb_s": Value(2 * COPIED / slowest.copy / 1e9, "measured"),
        "launch_us": Value(slowest.launches / LAUNCHES * 1e6, "measured"),
    }
    peak = peak_tflops(card, "bf16-mixed")
    if peak is None or peak < attained:  # unknown
        values["peak_tflops"] = Value(attained, "measured")
        values["attained"] = Value(1.0, "given")
    else:
        values["peak_tflops"] = Value(peak, "datasheet")
        values["attained"] = Value(attained / peak, "measured")
    return values


def link_values(slowest: RankTimes, ranks: int) -> dict[str, Value]:
    """Return rate and latency of the links: the time of an exchange is a line over its bytes."""
    if slowest.large <= slowest.small:
        raise ConfigError(
            f"cluster is measure: an exchange of {LARGE_BYTES} bytes took"
            f" {1e3 * slowest.large:.3g} ms, one of {SMALL_BYTES} bytes"
            f" {1e3 * slowest.small:.3g} ms, so the links have no rate. Stop"
            f" other work and measure again. {INSTEAD}"
        )
    travels = (ranks - 1) / ranks
    small, large = (nbytes // ranks * ranks * travels for nbytes in (SMALL_BYTES, LARGE_BYTES))
    rate = (large - small) / (slowest.large - slowest.small)
    latency = max(0.0, slowest.small - small / rate)
    return {
        "links.node.gb_s": Value(rate / 1e9, "measured"),
        "links.node.latency_us": Value(latency * 1e6, "measured"),
    }


# ---------------------------------------------------------------------- on every rank


def _rank(rank: int, ranks: int, store: str, results: Any) -> None:
    """Measure on one of the ranks, and put its seconds into the queue."""
    on_cards = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_cards else torch.device("cpu")
    if on_cards:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        use_loopback_for_gloo()
    if ranks == 1:
        results.put(seconds_on(device))
        return
    dist.init_process_group(
        "nccl" if on_cards else "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        device_id=device if on_cards else None,
        timeout=EXCHANGE_TIMEOUT,
    )
    results.put(seconds_on(device, all_to_all(dist.group.WORLD), ranks))
    dist.barrier()
    dist.destroy_process_group()


def seconds_on(device: torch.device, exchange: Exchange | None = None, ranks: int = 1) -> RankTimes:
    """Return what is measured on a rank. Every rank must call it. exchange: None: there is one rank
    only."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows, width, columns = HOST_SIZES if device.type == "cpu" else CARD_SIZES
    x_RD = torch.randn(rows, width, device=device, dtype=dtype)
    w_DF = torch.randn(width, columns, device=device, dtype=dtype)
    source = torch.zeros(COPIED, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    few = torch.zeros(8, device=device)

    calls: dict[str, Callable[[], Any]] = {
        "product": lambda: x_RD @ w_DF,
        "copy": lambda: target.copy_(source),
        "launches": lambda: [few.add_(1) for _ in range(LAUNCHES)],
    }
    if exchange is None:
        return RankTimes(**medians(calls, device))

    def send(sent: torch.Tensor) -> None:
        _, work = exchange(sent, None)
        work.wait()

    small, large = (
        torch.zeros(nbytes // ranks * ranks, device=device, dtype=torch.uint8)
        for nbytes in (SMALL_BYTES, LARGE_BYTES)
    )
    calls |= {"small": lambda: send(small), "large": lambda: send(large)}
    alone = RankTimes(**medians(calls, device))
    products = max(1, round(EXCHANGES_BESIDE * alone.large / alone.product))

    def beside() -> None:
        # the list keeps buffers until they end
        started = [exchange(large, None) for _ in range(EXCHANGES_BESIDE)]
        for _ in range(products):
            calls["product"]()
        for _, work in started:
            work.wait()

    both = products * alone.product, EXCHANGES_BESIDE * alone.large
    took = medians({"beside": beside}, device)["beside"]
    return alone._replace(lost=took - max(both), hidden=min(both))


def medians(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Return the median seconds of each call."""
    timed = {name: partial(seconds, call, device) for name, call in calls.items()}
    rounds = in_turn(timed, ROUNDS, WARM_UP)
    return {name: median(times) for name, times in rounds.items()}
