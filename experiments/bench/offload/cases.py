"""What `figure 13` measures of each architecture."""

from collections.abc import Mapping
from dataclasses import dataclass, field

RESIDENT = "resident"  # the way without offloading


@dataclass(frozen=True)
class Way:
    """Figures of one way to hold the experts.

    hidden: the share of blocking's extra time that the way takes away; bound: the most that it can;
    hit_rate: of the cache. All three are None for resident experts.
    """

    latency_ms: float
    hidden: float | None = None
    bound: float | None = None
    hit_rate: float | None = None


@dataclass(frozen=True)
class Case:
    """Figures of one number of tokens at one rate.

    kept, tried: rounds. equal_bits: whether all ways return the same logits. active: experts that
    have rows, per layer. blocking_costs: the extra time of blocking over the resident block. The
    fields from `ways` on are empty or None where no round was kept.
    """

    tokens: int
    rate_mb_s: float
    kept: int
    tried: int
    equal_bits: bool
    ways: Mapping[str, Way] = field(default_factory=dict)
    block_ms: float | None = None
    window_ms: float | None = None
    fetch_ms: float | None = None
    active: float | None = None
    blocking_costs: float | None = None


@dataclass(frozen=True)
class Memory:
    """Memory in MB: of the fixed weights, and the peak of each way beyond them."""

    fixed_mb: float
    peak_mb: Mapping[str, float]


@dataclass(frozen=True)
class Offloading:
    """Figures of one architecture. rates: in MB/s, one for each cost of the setting."""

    cases: tuple[Case, ...]
    memory: Memory
    rates: tuple[float, ...]
