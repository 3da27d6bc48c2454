"""The figures of a row of `bench inference` in prefill and in decode."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.bench.row import BESIDE_ITS_ROW, from_json

Shape = Literal["prefill", "decode"]
SHAPES: tuple[Shape, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class PassAtLoad:
    """What a load costs a pass. over_balanced: its time over that with balanced routing. balanced:
    its speed-up there. The others say how uneven the routing is (loads.imbalance)."""

    over_balanced: float
    over_balanced_quartiles: list[float]
    max_over_mean_ranks: float
    max_over_mean_experts: float
    max_over_mean_tokens: float
    balanced: float


@dataclass(frozen=True)
class PassFigures:
    """A row in prefill or in decode: medians; speed-ups are over sequential top-2.

    auto: how `scmoe generate` runs the transfers; speedup, ms and tokens_per_s are measured so.
    limit: the speed-up without transfers. gain: over the row's own architecture, sequential. ways:
    the speed-up by how transfers run. slots, inside_attention: where the experts run, by the same.
    over_best_without_another_model: what the row gains over top-2 at its best. at_load: None at the
    balanced load.
    """

    speedup: float
    quartiles: list[float]
    auto: str
    ms: float
    tokens_per_s: float
    limit: float
    gain: float
    ways: dict[str, float]
    slots: dict[str, int]
    inside_attention: dict[str, bool] = field(default_factory=dict)
    over_best_without_another_model: dict[str, Any] | None = None
    at_load: PassAtLoad | None = field(default=None, metadata=BESIDE_ITS_ROW)


def passes_of(report: Mapping[str, Any], shape: Shape) -> dict[str, PassFigures]:
    """Return the rows of a report that have a pass of this shape. Earlier reports have the tokens a
    second in the row."""
    passes = {}
    for name, row in report["rows"].items():
        if shape in row:
            of_row = {"tokens_per_s": row.get(f"{shape}_tokens_per_s")}
            passes[name] = from_json(PassFigures, of_row | row[shape])
    return passes
