"""What the benches of pairs of blocks can be asked for. Nothing here imports torch, so the command line reads it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.schedule.schedule import POSITIONS, Schedule

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Positive = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Rounds = Annotated[int, Parameter(validator=validators.Number(gte=2))]  # of which quartiles are taken
INNER = Parameter(parse=False)  # no option of `bench overlap`, or one whose default depends on others
USUAL_RATIO = 3.0  # bytes of rows for a byte of gradients in an iteration; the paper's: docs/results/method.md
CHUNKS = {"": (1,), "_pipelined": (2, 4)}  # numbers of chunks to choose from
USUAL_ROWS = {  # row: (block, numbers of chunks); top2, top2_pipelined, ..., scmoe_pos1, ..., scmoe_pos1_pipelined, ...
    **{name + way: (name, CHUNKS[way]) for name in ("top2", "top1", "shared_expert") for way in CHUNKS},
    **{f"scmoe_{position}{way}": (position, CHUNKS[way]) for way in CHUNKS for position in POSITIONS},
}
# Table 4 has two more, which are measured where they are asked for: scmoe2 routes each token to two experts, at Pos-2
ROWS = USUAL_ROWS | {name: (name, CHUNKS[""]) for name in ("top3", "scmoe2")}
TOP_K = {"top2": 2, "top3": 3, "scmoe2": 2}  # routed experts of a token; 1 in all other blocks


@Parameter(name="*")
@dataclass(frozen=True)
class Setting:
    """A measurement of pairs.

    share: of communication, reached by a search for the links' rate. compute: real | emulated. shaped: whether the
    links have a rate at all. bus: rows go over the device's bus instead of links (emulated.over_the_bus), and the share
    is reached by its rate. reductions: of the gradients, as the Strategy's. dim, ffn_dim, heads: of every block.
    tokens: of one rank in one batch, in sequences of seq_len. accumulate: batches of a training step.
    rows_per_gradient: the ratio for which the tokens were chosen (tokens_for); None: they were given.
    loads: of the experts (loads.py), beside the balanced one, which is always measured.

    Args:
        link_mbit: rate of the links; by default it is searched for the share
        nodes: on which the ranks are; the rate is that of the nodes' network cards
        exchange: between nodes
        rows: rows to measure
        layout: dropless | capacity:F | buffers:C (default: capacity:1, and dropless with --load)
        attention_ms: time of an emulated attention
        attention_to_mlp: its ratio to that of an emulated MLP
    """

    share: Annotated[float, INNER] = 0.52
    link_mbit: Positive | None = None
    compute: Annotated[str, INNER] = "emulated"
    level: Literal["block", "iteration"] = "block"
    rounds: Rounds = 9
    dim: Annotated[int, INNER] = 512
    ffn_dim: Annotated[int, INNER] = 2048
    heads: Annotated[int, INNER] = 8
    tokens: Annotated[int, INNER] = 1024
    seq_len: Count = 256
    accumulate: Annotated[int, INNER] = 1
    rows_per_gradient: Annotated[float | None, INNER] = None
    num_experts: Count = 8
    attention_ms: Positive = 45.0
    attention_to_mlp: Positive = 3.0
    shaped: Annotated[bool, INNER] = True
    device: Annotated[str, INNER] = "cpu"
    dtype: Annotated[str, INNER] = "float32"
    bus: Annotated[bool, INNER] = False
    reductions: Annotated[str, INNER] = "paced"
    nodes: Count = 1
    exchange: Literal["flat", "hierarchical", "auto"] = "flat"
    rows: Annotated[tuple[str, ...], Parameter(show_default=lambda _: "all")] = tuple(USUAL_ROWS)
    loads: Annotated[tuple[str, ...], INNER] = ()
    layout: str | None = None

    @property
    def sequences(self) -> int:
        """Sequences of one rank in one batch."""
        return self.tokens // self.seq_len

    @property
    def pairs(self) -> int:
        """Pairs in a row."""
        return 2 if self.level == "iteration" else 1


def tokens_for(ratio: float, setting: Setting) -> int:
    """Return the tokens of a batch with which a rank sends so many bytes of rows for a byte of dense gradients in a
    training step of top-2, in whole sequences.

    A pair sends 2 copies of a token, there and back, forward and backward, and a row of one rank in R leaves it with
    probability 1 - 1 / R; a ring sends 2 (1 - 1 / R) of the gradients of two attentions and an MLP."""
    gradients = 2 * (8 * setting.dim**2 + 2 * setting.dim * setting.ffn_dim)
    rows_of_a_token = 4 * TOP_K["top2"] * setting.dim * setting.accumulate
    return max(1, round(ratio * gradients / rows_of_a_token / setting.seq_len)) * setting.seq_len


def pair_of(config: Config, share: float, tokens: int) -> Setting:
    """Return a pair of a configuration's sizes, on which the links' rate is searched. tokens: of one rank."""
    model, data = config.model, config.data
    return Setting(
        share,
        compute="real",
        dim=model.dim,
        ffn_dim=model.ffn_dim or 4 * model.dim,
        heads=model.heads,
        tokens=tokens,
        seq_len=data.seq_len,
        num_experts=config.moe.num_experts,
        rows=(),
    )


def check_ranks(ranks: int) -> None:
    """Raise ConfigError for a number of ranks that cannot share the usual number of experts."""
    if ranks < 2 or Setting.num_experts % ranks:
        raise ConfigError(f"--ranks is {ranks}, allowed: divisors of the {Setting.num_experts} experts from 2 on")


def default_schedule(block: str) -> Schedule:
    """The experts in the middle of the window, in one chunk. block: a block's name in ROWS."""
    if block in POSITIONS:
        return Schedule("scmoe", block)
    if block == "scmoe2":
        return Schedule("scmoe", "pos2")
    return Schedule("shared_expert" if block == "shared_expert" else "top_k")
