"""How long a transfer takes on a shaped link, alone after an idle time and queued behind others,
and what it costs a rank that computes. Run as `python -m experiments.bench.shaped_link`.
"""

import time
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from experiments.bench.overlap_report import PAYLOAD
from experiments.bench.pairs import Setting, default_schedule
from experiments.bench.rank_bench import Bench
from experiments.bench.stacks import Variant
from experiments.engine import links
from experiments.engine.ranks import run_ranks
from scmoe.parallel.wire.all_to_all import point_to_point

RATES = (130, 225, 300)  # Mbit/s
SIZES = (64, 128, 256, 512, 1024, 3072)  # KiB, in each direction
ROUNDS = 7
ROUNDS_OF_BLOCKS = 25


def transfers(rank: int, world_size: int) -> dict[tuple[int, int], list[float]]:
    """Return milliseconds of a transfer alone, and of each further one of four, by rate and
    size."""
    dist.init_process_group("gloo")
    found = {}
    for rate in RATES:
        links.set_rate(rate)
        dist.barrier()
        for size in SIZES:
            numbers = world_size * size * 2**10 // 4
            rows = [torch.randn(numbers) for _ in range(4)]
            targets = [torch.empty(numbers) for _ in range(4)]

            def ends(count: int, rows=rows, targets=targets) -> list[float]:
                dist.barrier()
                time.sleep(0.05)
                start = time.perf_counter()
                works = [
                    point_to_point(targets[i], rows[i], [], [], dist.group.WORLD)
                    for i in range(count)
                ]
                done = []
                for work in works:
                    work.wait()
                    done.append(1e3 * (time.perf_counter() - start))
                return done

            ends(4)
            alone = median(ends(1)[0] for _ in range(ROUNDS))
            four = [ends(4) for _ in range(ROUNDS)]
            further = (median(e[3] for e in four) - median(e[0] for e in four)) / 3
            found[rate, size] = [alone, further]
    return found


def blocks(rank: int, world_size: int, tokens: int, rate: float) -> dict[Variant, float]:
    """Return milliseconds of forward passes of blocks, in turn."""
    dist.init_process_group("gloo")
    rows = "top2", "shared_expert_two", "scmoe_pos2_two"
    usual = replace(Setting.iteration(), compute="real", seq_len=128)
    bench = Bench(replace(usual, tokens=tokens, rows=rows))
    bench.set_rate(rate)
    variants = [
        Variant(block, default_schedule(block), transfers, batches_in_flight=batches)
        for block in ("top2", "shared_expert", "pos2")
        for batches in (1, 2)
        for transfers in ("alone", "overlapped")
    ]
    times: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for _ in range(3 + ROUNDS_OF_BLOCKS):
        for variant in variants:
            times[variant].append(1e3 * bench.infer(variant))
    return {variant: median(each[3:]) for variant, each in times.items()}


def main() -> None:
    links.require()
    run = partial(run_ranks, own_links=True, timeout_s=300)
    for (rate, size), (alone, further) in run(transfers, 2)[0].items():
        by_rate = size * 2**10 / (rate * 1e6 / 8 * PAYLOAD) * 1e3
        burst = links.BURST_KIB * 2**10 / (rate * 1e6 / 8) * 1e3
        print(
            f"{rate} Mbit/s, {size:4} KiB: alone {alone:6.1f} ms, queued {further:6.1f} ms, by rate"
            f" {by_rate:6.1f} ms, burst {burst:4.1f} ms"
        )
    for tokens, rate in ((512, 230.0), (256, 146.0)):
        for variant, ms in run(blocks, 2, tokens, rate)[0].items():
            kind = f"{variant.block}, {variant.batches_in_flight} in flight, {variant.transfers}"
            print(f"{tokens} tokens, {kind}: {ms:.1f} ms")


if __name__ == "__main__":
    main()
