"""The settings of the other benches. Each is the command line of its bench, which cyclopts reads,
and the `setting` of its report.

Nothing here imports torch, so the command line is read and refused at once.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from experiments.bench.setting import (
    FILLED,
    NO_OPTION,
    NUM_EXPERTS,
    Compute,
    Filled,
    Loads,
    Positive,
    Rounds,
    Setting,
    Share,
    check_ranks,
    fill,
)
from scmoe.command_line import Count
from scmoe.config.leaves import ConfigError

GENERATED_TOKENS = 256


@Parameter(name="*")
@dataclass(frozen=True)
class InferenceSetting:
    """What `bench inference` measures.

    Args:
        share: communication share of a sequential top-2 prefill
        prompt: tokens of a prompt in prefill
        texts: prompts of a rank in prefill; of two or more, each architecture is measured with two
            batches in flight too (NAME_two)
        batch: texts of a rank in decode
        tokens: new tokens of each text of the generation (default: 256; with --load it is not
            measured, as routing between ranks does not change it)
        loads: uneven routing (its forms: bench overlap --help), measured beside the balanced one;
            each --load is one more
    """

    share: Share = 0.52
    ranks: int = 2
    prompt: int = 512
    texts: Count = 1
    batch: int = 8
    tokens: Annotated[int, Parameter(validator=validators.Number(gte=2))] | None = None
    rounds: Rounds = 9
    loads: Loads = ()
    dim: Annotated[int, NO_OPTION] = 512
    ffn_dim: Annotated[int, NO_OPTION] = 2048
    heads: Annotated[int, NO_OPTION] = 8
    links: Annotated[Literal["shaped", "loopback"], NO_OPTION] = "shaped"

    def __post_init__(self) -> None:
        check_ranks(self.ranks)
        if self.loads and self.tokens is not None:
            raise ConfigError("--tokens and --load exclude each other: a load has no generation")

    @property
    def new_tokens(self) -> int:
        """Return the new tokens of each text of the generation; 0: it is not measured."""
        return 0 if self.loads else self.tokens or GENERATED_TOKENS

    @property
    def pair(self) -> Setting:
        """Return the pair of blocks whose sequences are the prompts of a rank in prefill."""
        return Setting(
            self.share,
            ranks=self.ranks,
            compute="real",
            rounds=self.rounds,
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            heads=self.heads,
            tokens=self.texts * self.prompt,
            seq_len=self.prompt,
            loads=self.loads,
            layout="dropless",
            links=self.links,
        )


TrainingRow = Literal[
    "top2",
    "shared_expert",
    "scmoe_pos2",
    "scmoe_pos3",
    "top2_two",
    "shared_expert_two",
    "scmoe_pos2_two",
    "scmoe_pos3_two",
]


@Parameter(name="*")
@dataclass(frozen=True)
class TrainingSetting:
    """What `bench train` measures.

    Args:
        share: communication share of a sequential top-2 pair of the config's sizes, forward
        rounds: turns of each training in the second half of its steps; exposed rows are measured
            in those with a logged step
        rows: the first is what the others are compared with (default: all with one batch in flight)
        load: uneven routing (its forms: bench overlap --help) in place of the routers' choices,
            beside balanced routing
    """

    config: str = "experiment/slow_network"
    share: Share = 0.52
    ranks: int = 2
    rounds: Rounds = 10
    rows: Filled[tuple[TrainingRow, ...]] = FILLED
    load: str | None = None

    def __post_init__(self) -> None:
        fill(self, rows=("top2", "shared_expert", "scmoe_pos2", "scmoe_pos3"))
        if self.ranks < 2:
            raise ConfigError(
                f"--ranks is {self.ranks}, allowed: 2 or more, as one rank sends nothing"
            )


@Parameter(name="*")
@dataclass(frozen=True)
class TimelineSetting:
    """A pair whose operators `bench timeline` draws."""

    share: Share = 0.52
    ranks: int = 2
    compute: Compute = "emulated"

    def __post_init__(self) -> None:
        check_ranks(self.ranks)


@Parameter(name="*")
@dataclass(frozen=True)
class LayerSetting:
    """What `bench layer` measures.

    Args:
        capacity: capacity factor (default: dropless)
    """

    dim: Count = 512
    ffn_dim: Count = 2048
    tokens: Count = 2048
    experts: Count = 8
    top_k: Count = 2
    rounds: Count = 15
    threads: Count = 1
    capacity: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=1e6))] | None = None

    def __post_init__(self) -> None:
        for option, width in (("--dim", self.dim), ("--ffn-dim", self.ffn_dim)):
            if width % 8:
                raise ConfigError(
                    f"{option} is {width}, allowed: multiples of 8, as products of experts need"
                    " rows aligned to 16 bytes"
                )
        if self.top_k > self.experts:
            raise ConfigError(
                f"--top-k is {self.top_k}, allowed: at most --experts ({self.experts})"
            )


Offloaded = Literal["scmoe_pos1", "scmoe_pos2", "scmoe_pos3", "shared_expert", "top2"]
# the first one gives the rates
OFFLOADED: tuple[Offloaded, ...] = (
    "scmoe_pos2",
    "scmoe_pos1",
    "scmoe_pos3",
    "shared_expert",
    "top2",
)


@Parameter(name="*")
@dataclass(frozen=True)
class OffloadSetting:
    """What `figure 13` measures.

    Args:
        quick: figure 13: try the command in seconds with a tiny model, two rounds and every time
            kept; the result says nothing about speed
        architectures: figure 13: those that are measured (default: all)
        tokens: figure 13: tokens of a forward pass (default: 1 4 64)
        rounds: figure 13: times to keep of each way (default: 15)
        limit_s: figure 13: seconds for each case (default: 10)
        costs: of blocking, one token, over the resident MoE block; each gives a rate
        max_wait: share of a time in which the process may have waited for a core
    """

    quick: bool = False
    architectures: Filled[tuple[Offloaded, ...]] = FILLED
    tokens: Filled[tuple[Count, ...]] = FILLED
    rounds: Filled[Count] = FILLED
    limit_s: Filled[Positive] = FILLED
    dim: Filled[Annotated[int, NO_OPTION]] = FILLED
    ffn_dim: Filled[Annotated[int, NO_OPTION]] = FILLED
    heads: Filled[Annotated[int, NO_OPTION]] = FILLED
    num_experts: Annotated[int, NO_OPTION] = NUM_EXPERTS
    pairs: Filled[Annotated[int, NO_OPTION]] = FILLED
    costs: Annotated[tuple[float, ...], NO_OPTION] = (0.8, 2.4)
    max_wait: Filled[Annotated[float, NO_OPTION]] = FILLED

    def __post_init__(self) -> None:
        quick = self.quick
        fill(
            self,
            architectures=OFFLOADED,
            tokens=(1, 8) if quick else (1, 4, 64),
            rounds=2 if quick else 15,
            limit_s=2.0 if quick else 10.0,
            dim=64 if quick else 1024,
            ffn_dim=128 if quick else 4096,
            heads=2 if quick else 16,
            pairs=2 if quick else 4,
            max_wait=float("inf") if quick else 0.03,
        )
        object.__setattr__(self, "tokens", tuple(sorted(set(self.tokens))))

    @property
    def expert_mb(self) -> float:
        return 2 * self.dim * self.ffn_dim * 4 / 1e6
