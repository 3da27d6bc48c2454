"""The measurement of `bench inference` on one rank: what overlap gains in prefill and in decode, in
small GPTs of one pair of blocks, on links whose rate gives prefill a share of communication.

    prefill    each rank reads its prompts into an empty cache: the time to the first token
    decode     each rank reads one token of each of `batch` texts, whose prompts are in the cache:
               the time of a token
    transfers  sequential; overlapped with 1, 2 and 4 chunks, at the best slots for the shape; free,
               that is without any
    auto       as `scmoe generate` runs them: prefill overlapped in one chunk, decode sequential

With several prompts a rank each architecture has a second row, NAME_two: its prefill with two
batches in flight, in one chunk each. Decode is sequential, so this row has none.

The models are dropless. Their experts get equal shares, or with a load those of uneven routing
(scmoe/loads.py), measured beside the balanced one.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.bench import emulated
from experiments.bench.inference.pass_figures import SHAPES, Shape
from experiments.bench.inference.passes import (
    PASSES,
    a_pass,
    best_in_halves,
    best_schedules,
    pass_seconds,
    price_passes,
)
from experiments.bench.other_settings import InferenceSetting
from experiments.bench.pairs import default_schedule
from experiments.bench.rate_search import find_rate
from experiments.bench.stacks import Variant, make_blocks
from experiments.engine import links
from experiments.engine.ranks import say_once
from scmoe.loads import BALANCED, CurrentLoad, load_of
from scmoe.models.decoder import GPT
from scmoe.models.run_as import run_as
from scmoe.moe.dispatcher import Blocking, Pending, Ready, Receipt
from scmoe.parallel.mesh import build_mesh
from scmoe.parallel.wire.all_to_all import AllToAllDispatcher
from scmoe.parallel.wire.announced import ReadByHost
from scmoe.parallel.wire.wire import Wire
from scmoe.planning.clock import CPU, in_turn
from scmoe.predict.row_names import TWO
from scmoe.schedule.schedule import POSITIONS, ModelSchedule

MEASURED_BLOCKS = ("top2", "top1", "shared_expert", "pos1", "pos2", "pos3")
CHUNK_COUNTS = (1, 2, 4)
OVERLAPPED = tuple(f"overlapped x {chunks}" for chunks in CHUNK_COUNTS)
IN_TWO_BATCHES = "two batches"  # how transfers run with two batches in flight
VOCABULARY = 1024


def row_name(variant: Variant) -> str:
    """Return the name of the row that a variant belongs to."""
    block = variant.block
    row = f"scmoe_{block}" if block in POSITIONS else block
    return row + TWO if variant.batches_in_flight == 2 else row


@dataclass(frozen=True)
class AsIfAnnounced:
    """Transfers that return their own rows at once, and numbers of rows as if all ranks had
    announced the same."""

    inner: AllToAllDispatcher

    def announce(self, counts_PE: Tensor) -> Any:
        ranks = self.inner.ep_size
        by_rank = counts_PE.expand(ranks, *counts_PE.shape).reshape(
            ranks, len(counts_PE), ranks, -1
        )
        return ReadByHost(Ready(None), by_rank, dist.get_rank(self.inner.group), None)

    def dispatch(self, rows_RD: Tensor, counts: Any) -> tuple[Pending, Receipt]:
        return self.inner.dispatch(rows_RD, counts)

    def combine(self, rows_RD: Tensor, receipt: Receipt) -> Pending:
        return self.inner.combine(rows_RD, receipt)


class InferenceBench:
    """Holds the models of one rank and runs passes."""

    def __init__(self, setting: InferenceSetting) -> None:
        self.setting = setting
        pair = setting.pair
        mesh = build_mesh(dist.get_world_size(), CPU, timedelta(seconds=300))
        self.group = mesh.ep_group
        torch.manual_seed(0)
        self.models: dict[str, Any] = {}
        self.now = CurrentLoad(load_of(BALANCED))
        # how often each one ran: the steps of its load
        self.turns: Counter[tuple[Shape, Variant]] = Counter()
        for name in MEASURED_BLOCKS:
            blocks = make_blocks(name, pair, Wire(mesh), self.now)
            self.models[name] = GPT(VOCABULARY, pair.seq_len + 1, pair.dim, blocks).eval()
        self.paid = AllToAllDispatcher(self.group, pair.num_experts)
        self.free = AsIfAnnounced(
            AllToAllDispatcher(self.group, pair.num_experts, exchange=emulated.free)
        )
        self.passes: dict[tuple[str, Shape], Any] = {}
        for shape, texts in zip(SHAPES, (setting.texts, setting.batch), strict=True):
            ids_BS = torch.randint(VOCABULARY, (texts, setting.prompt))
            self.passes |= {
                (name, shape): a_pass(model, shape, ids_BS) for name, model in self.models.items()
            }

    def seconds(self, shape: Shape, variant: Variant) -> float:
        """Return the seconds of a pass. variant: its transfers are sequential, free, or
        overlapped."""
        self.now.load, self.now.step = load_of(variant.load), self.turns[shape, variant]
        self.turns[shape, variant] += 1
        dispatcher: Any = self.free if variant.transfers == "free" else self.paid
        if variant.transfers == "sequential":
            dispatcher = Blocking(self.paid)
        model = self.models[variant.block]
        schedule = ModelSchedule((variant.schedule,), variant.batches_in_flight)
        run_as(model, schedule, [dispatcher])
        return pass_seconds(self.passes[variant.block, shape], self.group, CPU, PASSES[shape])

    def variants(self, block: str, shape: Shape, load: str) -> list[Variant]:
        """Return the variants of a model in one shape at a load, at the best slots."""
        self.now.load, self.now.step = load_of(load), 0
        schedule = default_schedule(block)
        model = self.models[block]
        run_as(model, ModelSchedule((schedule,)), [self.paid])
        priced = price_passes(model, self.passes[block, shape], self.group, CPU, CHUNK_COUNTS)
        variants = [Variant(block, schedule, name, load) for name in ("sequential", "free")]
        variants += [
            Variant(block, best[0], f"overlapped x {chunks}", load)
            for chunks, best in best_schedules(priced).items()
        ]
        if shape == "prefill" and self.setting.texts > 1:
            in_halves = best_in_halves(priced)[0]
            variants += [
                Variant(block, in_halves, name, load, batches_in_flight=2)
                for name in (IN_TWO_BATCHES, "free")
            ]
        return variants


class MeasuredPasses(NamedTuple):
    """What was measured at one load. rate: of the links in Mbit/s; None: they have none. seconds:
    of each variant by rounds."""

    setting: InferenceSetting
    rate: float | None
    seconds: Mapping[tuple[Shape, Variant], Any]


def measure(rank: int, world_size: int, setting: InferenceSetting) -> dict[str, MeasuredPasses]:
    """Run on every rank. Return what was measured at each load, the balanced one first; the caller
    uses rank 0's result."""
    dist.init_process_group("gloo")
    with torch.inference_mode():
        bench = InferenceBench(setting)
        rate = None
        if setting.links == "shaped":
            rate = find_rate(setting.pair, links.set_rate, partial(bench.seconds, "prefill"))
        loads = tuple(dict.fromkeys((BALANCED, *setting.loads)))
        runs: dict[tuple[Shape, Variant], Any] = {}
        for load in loads:
            for block in MEASURED_BLOCKS:
                say_once(f"planning {block}" + (f" at {load}" if setting.loads else ""))
                for shape in SHAPES:
                    runs |= {
                        (shape, variant): partial(bench.seconds, shape, variant)
                        for variant in bench.variants(block, shape, load)
                    }
        times = in_turn(runs, setting.rounds, over_ranks=True, say=say_once)
        results = {}
        for load in loads:
            of_load = {run: seconds for run, seconds in times.items() if run[1].load == load}
            results[load] = MeasuredPasses(setting, rate, of_load)
        return results
