"""The rows of a report of `bench inference`, as they are computed and as JSON has them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Shape = Literal["prefill", "decode"]
SHAPES: tuple[Shape, ...] = ("prefill", "decode")
MILLISECONDS: dict[Shape, str] = {"prefill": "ttft_ms", "decode": "tpot_ms"}  # keys of JSON


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
    at_load: PassAtLoad | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what a report has of the pass. The tokens a second are the row's."""
        content = asdict(self)
        del content["tokens_per_s"]
        return content | (content.pop("at_load") or {})

    @classmethod
    def from_json(cls, content: Mapping[str, Any], tokens_per_s: float) -> "PassFigures":
        """Return a pass of a report; older reports lack some figures."""
        names = {each.name for each in fields(cls)}
        figures = {name: value for name, value in content.items() if name in names}
        if "over_balanced" in content:
            names_at_load = [each.name for each in fields(PassAtLoad)]
            figures["at_load"] = PassAtLoad(**{name: content[name] for name in names_at_load})
        return cls(**figures, tokens_per_s=tokens_per_s)

    def cells(self) -> dict[str, Any]:
        """Return what a table shows of the pass."""
        return {**self.to_json(), "tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True)
class InferenceRow:
    """A row. passes: prefill and decode; with two batches in flight prefill alone."""

    passes: dict[Shape, PassFigures]
    batches_in_flight: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return what a report has of the row."""
        content: dict[str, Any] = {"batches_in_flight": self.batches_in_flight}
        for shape, figures in self.passes.items():
            content[f"{shape}_speedup"] = figures.speedup
            content[MILLISECONDS[shape]] = figures.ms
            content[f"{shape}_tokens_per_s"] = figures.tokens_per_s
            content[shape] = figures.to_json()
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "InferenceRow":
        """Return the row of a report."""
        passes = {
            shape: PassFigures.from_json(content[shape], content[f"{shape}_tokens_per_s"])
            for shape in SHAPES
            if shape in content
        }
        return cls(passes, content.get("batches_in_flight", 1))


def passes_of(report: Mapping[str, Any], shape: Shape) -> dict[str, PassFigures]:
    """Return the rows of a report from JSON that have a pass of this shape."""
    rows = {name: InferenceRow.from_json(content) for name, content in report["rows"].items()}
    return {name: row.passes[shape] for name, row in rows.items() if shape in row.passes}
