"""The setting of a measurement of blocks. It is the command line of `bench overlap`, which cyclopts
reads, and the `setting` of its report.

Nothing here imports torch, so the command line is read and refused at once.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar, cast

from cyclopts import ArgumentCollection, Group, Parameter, validators

from experiments.bench.pairs import BLOCK_TOP_K, ROWS, usual_rows
from scmoe.command_line import Count
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError

Value = TypeVar("Value")
Positive = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Share = Annotated[float, Parameter(validator=validators.Number(gt=0, lt=1))]
# of rounds quartiles are taken
Rounds = Annotated[int, Parameter(validator=validators.Number(gte=2))]
Compute = Literal["real", "emulated"]
# --load a --load b, not --load a b
Loads = Annotated[
    tuple[str, ...], Parameter(name="--load", consume_multiple=False, allow_repeating=None)
]
NO_OPTION = Parameter(parse=False)
FILLED: Any = None  # by __post_init__, with what is usual
if TYPE_CHECKING:
    Filled = Annotated[Value, FILLED]  # a setting that is made has the value
else:
    Filled = Optional  # cyclopts checks defaults too
PAIR_TOKENS = 1024  # of a rank in one batch, of one pair
# bytes of rows for a byte of gradients in an iteration; the paper's: docs/results/method.md
USUAL_RATIO = 3.0
NUM_EXPERTS = 8


def fill(setting: Any, **usual: Any) -> None:
    """Set the fields of a frozen setting that nobody has given."""
    for name, value in usual.items():
        if getattr(setting, name) is None:
            object.__setattr__(setting, name, value)


@Parameter(name="*")
@dataclass(frozen=True)
class Setting:
    """A measurement of a row of blocks: a pair, or in an iteration two.

    Args:
        share: communication share of sequential top-2, forward (default: 0.52)
        link_mbit: rate of the links; by default it is searched for the share
        ranks: ranks that exchange rows (default: 2; on cuda 1)
        compute: real operators, or emulated ones that sleep (default: emulated; on cuda real)
        device: cuda: one GPU, rows over its bus
        level: block: one pair of blocks; iteration: a training step of two pairs, with sums of
            gradients and AdamW
        every: 2: an MoE in every second block; 1: in every block
        layers: blocks of a row (default: 2; at level iteration 4)
        rows: rows to measure (default: all with one batch in flight). NAME_two: with two batches in
            flight; NAME_two_pipelined: in two chunks too
        loads: uneven routing, measured beside the balanced one; each --load is one more. Forms
            (scmoe/loads.py): zipf:A, hot_rank:X, rotating:X:N, ragged:X, recorded:FILE; A is
            an exponent, X a multiple of the mean, N a number of steps
        layout: dropless | capacity:F | buffers:C (default: capacity:1, and dropless with --load)
        dim: model width (default: 512; at level iteration 256)
        ffn_dim: hidden width (default: 4 times --dim)
        heads: attention heads (default: 8; at level iteration 4)
        head_dim: width of a head
        num_experts: routed experts of an MoE module
        top_k: routed experts of a token, except in rows whose name says it, such as top2
        tokens: of one rank in one batch (default: 1024; at level iteration as --rows-per-gradient)
        seq_len: tokens of a sequence
        rows_per_gradient: bytes of rows that a rank sends in a step of top-2, for each byte of
            gradients; the tokens of a batch follow from it (default: 3)
        accumulate: batches of a step, whose gradients are summed once
        attention_ms: time of an emulated attention
        attention_to_mlp: that time over the time of an emulated MLP
        rounds: how often each variant is measured
        tries: steps in which `schedule=auto` tries its candidates for a row, at most, but one for
            each (default: as in a training, 48); fewer shorten a series of measurements
        links: shaped to a rate; the loopback device as it is; or the device's bus
            (emulated.over_the_bus), whose rate is searched for the share
    """

    share: Filled[Share] = FILLED  # stays None with link_mbit
    link_mbit: Positive | None = None
    ranks: Filled[Count] = FILLED
    compute: Filled[Compute] = FILLED
    device: Literal["cpu", "cuda"] = "cpu"
    level: Literal["block", "iteration"] = "block"
    every: Literal[1, 2] = 2
    layers: Filled[Count] = FILLED
    rows: Filled[tuple[str, ...]] = FILLED
    loads: Loads = ()
    layout: str | None = None
    dim: Filled[Count] = FILLED
    ffn_dim: Filled[Count] = FILLED
    heads: Filled[Count] = FILLED
    head_dim: Annotated[int | None, NO_OPTION] = None
    num_experts: Count = NUM_EXPERTS
    top_k: Count = 1
    tokens: Filled[Count] = FILLED
    seq_len: Count = 256
    rows_per_gradient: Positive | None = None  # None: the tokens were given
    accumulate: Count = 1
    attention_ms: Positive = 45.0
    attention_to_mlp: Positive = 3.0
    rounds: Rounds = 9
    tries: Count | None = None
    links: Filled[Annotated[Literal["shaped", "loopback", "bus"], NO_OPTION]] = FILLED
    dtype: Annotated[str, NO_OPTION] = "float32"

    def __post_init__(self) -> None:
        asked: Any = self  # what nobody has given is None
        in_iteration = self.level == "iteration"
        on_gpu = self.device == "cuda"
        fill(
            self,
            ranks=1 if on_gpu else 2,
            compute="real" if on_gpu else "emulated",
            links="bus" if on_gpu else "shaped",
            layers=4 if in_iteration else 2,
            dim=256 if in_iteration else 512,
            heads=4 if in_iteration else 8,
        )
        fill(self, ffn_dim=4 * self.dim)
        if asked.rows is None:
            fill(self, rows=usual_rows(self.every))
        if self.link_mbit is None:
            fill(self, share=0.52)
        if in_iteration and asked.tokens is None:
            fill(self, rows_per_gradient=USUAL_RATIO)
        ratio = self.rows_per_gradient or USUAL_RATIO
        fill(self, tokens=tokens_for(ratio, self) if in_iteration else PAIR_TOKENS)
        object.__setattr__(self, "rows", without_repeats(self.rows))
        object.__setattr__(self, "loads", without_repeats(self.loads))

    @property
    def sequences(self) -> int:
        """Return the sequences of one rank in one batch."""
        return self.tokens // self.seq_len

    @property
    def moe_blocks(self) -> int:
        """Return the number of blocks of a row that have an MoE."""
        return self.layers // self.every

    @property
    def kind_of_layout(self) -> tuple[str, float]:
        """Return what `layout` says, and its number. ConfigError: there is no such layout."""
        text = self.layout or ("dropless" if self.loads else "capacity:1")
        kind, _, number = text.partition(":")
        if text == "dropless":
            return kind, 1.0
        if kind in ("capacity", "buffers"):
            with suppress(ValueError):
                if 0 < float(number) <= 1e6:
                    return kind, float(number)
        raise ConfigError(
            f"--layout is {text}, allowed: dropless | capacity:F | buffers:C, 0 < F, C <= 1e6"
        )

    def rows_per_copy(self, top_k: int) -> float:
        """Return the rows that travel for a routed copy of a token, at an even load. Empty slots
        and empty rows of buffers travel too. An expert has at most a slot for each token, a buffer
        at most a row for each copy."""
        kind, number = self.kind_of_layout
        most = max(2, self.ranks) if kind == "buffers" else self.num_experts / top_k
        return min(number, most)

    def block_of(self, row: str) -> str:
        """Return the block of a row (pairs.ROWS)."""
        return ROWS[self.every][row][0]

    def top_k_of(self, block: str) -> int:
        """Return the routed experts of a token in a block."""
        return BLOCK_TOP_K.get(block, self.top_k)


def without_repeats(names: Iterable[str]) -> tuple[str, ...]:
    """Return each name once, in their order."""
    return tuple(dict.fromkeys(names))


def tokens_for(ratio: float, setting: Setting) -> int:
    """Return the tokens of a batch that give a ratio of rows to gradients, in whole sequences.

    ratio: bytes of rows over bytes of dense gradients that a rank sends in a training step of
    top-2; one rank alone counts as two. A block with an MoE sends 2 copies of a token, there and
    back, forward and backward; a ring sends 2 (1 - 1 / R) of the gradients of each block's
    attention, and of the MLP of a block without an MoE.
    """
    ranks = max(2, setting.ranks)
    mlps = setting.layers - setting.moe_blocks
    weights = 4 * setting.layers * setting.dim**2 + 2 * mlps * setting.dim * setting.ffn_dim
    gradients = 2 * (1 - 1 / ranks) * weights
    top_k = BLOCK_TOP_K["top2"]
    rows = 4 * top_k * setting.rows_per_copy(top_k) * setting.moe_blocks * setting.accumulate
    rows_of_a_token = rows * setting.dim * share_sent(ranks)
    sequences = max(1, round(ratio * gradients / rows_of_a_token / setting.seq_len))
    return sequences * setting.seq_len


def share_sent(ranks: int) -> float:
    """Return the share of a rank's rows that leave it, at balanced routing."""
    return 1 - 1 / ranks


def refuse_contradictions(arguments: ArgumentCollection) -> None:
    """Raise ConfigError for options of `bench overlap` that exclude each other or change
    nothing."""
    typed = {argument.name: argument.value for argument in arguments if argument.tokens}
    if {"--share", "--link-mbit"} <= typed.keys():
        raise ConfigError(
            "--share and --link-mbit exclude each other: the rate is searched for the share, or"
            " given"
        )
    if {"--rows-per-gradient", "--tokens"} <= typed.keys():
        raise ConfigError(
            "--rows-per-gradient and --tokens exclude each other: the tokens are found, or given"
        )
    in_iteration = typed.get("--level") == "iteration"
    usual_compute = "real" if typed.get("--device") == "cuda" else "emulated"
    compute = typed.get("--compute", usual_compute)
    if not in_iteration:
        refuse("--level iteration, and --level is block", typed, "--rows-per-gradient")
        refuse("--level iteration, and --level is block", typed, "--accumulate")
    if compute == "emulated":
        refuse("real compute, and --compute is emulated", typed, "--heads")
        if not in_iteration:  # an iteration has the gradients of its MLPs
            refuse("real compute, and --compute is emulated", typed, "--ffn-dim")
    else:
        refuse("emulated compute, and --compute is real", typed, "--attention-ms")
        refuse("emulated compute, and --compute is real", typed, "--attention-to-mlp")


def refuse(where: str, typed: Mapping[str, Any], option: str) -> None:
    """Raise ConfigError if an option was typed that belongs elsewhere."""
    if option in typed:
        raise ConfigError(f"{option} belongs to {where}")


OVERLAP_OPTIONS = Group("Parameters", validator=refuse_contradictions)


def pair_setting(config: Config, share: float, ranks: int, tokens: int) -> Setting:
    """Return blocks of a configuration's sizes, on which the links' rate is searched.

    tokens: of one rank.
    """
    model, data = config.model, config.data
    return Setting(
        share,
        ranks=ranks,
        every=cast(Any, config.moe.every),  # any number
        layers=max(2, config.moe.every),
        compute="real",
        dim=model.dim,
        ffn_dim=model.ffn_dim or 4 * model.dim,
        heads=model.heads,
        head_dim=model.head_dim,
        tokens=tokens,
        seq_len=data.seq_len,
        num_experts=config.moe.num_experts,
        rows=(),
    )


def check_folder(out: Path) -> None:
    """Raise ConfigError if a folder cannot take a report, which is written when all is measured."""
    from scmoe.training.run.machine import why_not_writable

    if (why := why_not_writable(out)) is not None:
        raise ConfigError(f"--out cannot be written: {why}. Give another folder")


def check_ranks(ranks: int) -> None:
    """Raise ConfigError for a number of ranks that cannot share the usual number of experts."""
    if ranks < 2 or NUM_EXPERTS % ranks:
        raise ConfigError(
            f"--ranks is {ranks}, allowed: divisors of the {NUM_EXPERTS} experts from 2 on"
        )
