"""What the simulator is asked about the testbed, how close it should come, and the benches that
measure it. All of them together take less than 40 minutes on 2 cores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

OVER_BALANCED = "over balanced"
BOUNDED_LOAD = "hot_rank:1.7"  # the load of the goal; others are printed
ITERATION = (
    "overlap --compute real --level iteration --rows top2 shared_expert scmoe_pos2 scmoe_pos3"
)
LOAD_ROWS = "--rows top2 shared_expert scmoe_pos2 scmoe_pos2_pipelined scmoe_pos3"
TWO_ROWS = "--rows top2 shared_expert scmoe_pos2 top2_two shared_expert_two scmoe_pos2_two"
TESTBED_OUT = "--out docs/figures/testbed"


class Bound(NamedTuple):
    """The goal of a check: the worst error of its cells, and their mean."""

    worst: float
    mean: float | None = None


@dataclass(frozen=True)
class Check:
    """A question to the simulator. bounds: the goals, by quantity. benches: the words after `scmoe
    bench` that measure the reports which answer it."""

    name: str
    bounds: Mapping[str, Bound]
    benches: tuple[str, ...]

    @property
    def commands(self) -> list[str]:
        return [f"scmoe bench {words} {TESTBED_OUT}" for words in self.benches]


EMULATED_SHARE = Check(
    "emulated pair, other share",
    {"forward": Bound(0.05), "train": Bound(0.05)},
    ("overlap --share 0.52", "overlap --share 0.35"),
)
REAL_SHARE = Check(
    "real pair, other share",
    {"forward": Bound(0.10, 0.04), "train": Bound(0.10, 0.04)},
    ("overlap --share 0.52 --compute real", "overlap --share 0.15 --compute real --rounds 15"),
)
ITERATION_SHARE = Check(
    "iteration, other share",
    {"train": Bound(0.08), "step": Bound(0.12)},
    (f"{ITERATION} --share 0.52", f"{ITERATION} --share 0.35"),
)
ITERATION_RATIO = Check(
    "iteration, rows over gradients",
    {"train": Bound(0.08), "step": Bound(0.12)},
    (
        f"{ITERATION} --share 0.52 --rows-per-gradient 1",
        f"{ITERATION} --share 0.52 --rows-per-gradient 0.3 --seq-len 64",
    ),
)
LOAD = Check(
    "pair under load",
    {"forward": Bound(0.08), "train": Bound(0.08), OVER_BALANCED: Bound(0.08)},
    (f"overlap --share 0.52 --load hot_rank:1.7 {LOAD_ROWS}",),
)
TWO_BATCHES = Check(
    "two batches in flight",
    {"forward": Bound(0.08), "train": Bound(0.08)},
    (f"overlap --share 0.52 --layers 4 {TWO_ROWS}",),
)
CHECKS = (EMULATED_SHARE, REAL_SHARE, ITERATION_SHARE, ITERATION_RATIO, LOAD, TWO_BATCHES)
