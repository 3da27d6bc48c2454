"""What the benches of blocks can be asked for.

    every 2    a pair, Block-MLP and Block-MoE, as in the paper
    every 1    two blocks with an MoE each: the wirings of NVIDIA, NousResearch and FarSkip beside
               the baselines. There are two because the last two of these read what the block before
               hands on

Nothing here imports torch, so the command line reads it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from experiments.bench.two_batches import batches_of, rows_in_halves
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.schedule.schedule import POSITIONS, Schedule

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Positive = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Rounds = Annotated[
    int, Parameter(validator=validators.Number(gte=2))
]  # of which quartiles are taken
INNER = Parameter(
    parse=False
)  # no option of `bench overlap`, or one whose default depends on others
# bytes of rows for a byte of gradients in an iteration; the paper's: docs/results/method.md
USUAL_RATIO = 3.0
CHUNKS = {"": (1,), "_pipelined": (2, 4)}  # numbers of chunks to choose from
BASELINES = {
    name + way: (name, CHUNKS[way]) for name in ("top2", "top1", "shared_expert") for way in CHUNKS
}
IN_EVERY_BLOCK = {"scmoe_pos1": "nvidia", "scmoe_pos2": "nous", "farskip": "farskip"}
BY_REQUEST = ("top3", "scmoe2")  # Table 4's; scmoe2 routes each token to two experts, at Pos-2
ROWS: dict[
    int, dict[str, tuple[str, tuple[int, ...]]]
] = {  # by `every`; row: (block, numbers of chunks)
    2: {
        **BASELINES,
        **{
            f"scmoe_{position}{way}": (position, CHUNKS[way])
            for way in CHUNKS
            for position in POSITIONS
        },
        **{name: (name, CHUNKS[""]) for name in BY_REQUEST},
    },
    1: {
        **BASELINES,
        **{
            row + way: (block, CHUNKS[way])
            for way in CHUNKS
            for row, block in IN_EVERY_BLOCK.items()
        },
    },
}
for _rows in ROWS.values():
    _rows.update(rows_in_halves(_rows))
TOP_K = {
    "top1": 1,
    "top2": 2,
    "top3": 3,
    "scmoe2": 2,
}  # routed experts of a token; others have Setting.top_k
TAPS = {
    **{position: position for position in POSITIONS},
    "scmoe2": "pos2",
    "nvidia": "pos1",
    "nous": "carried",
}
WIRINGS: dict[
    str, tuple[str, ...]
] = {  # block: what a configuration says of it (docs/shortcuts.md), but every and K
    **{name: ("moe.architecture=top_k",) for name in ("top1", "top2", "top3")},
    **{name: (f"moe.architecture={name}",) for name in ("shared_expert", "farskip")},
    **{position: (f"moe.position={position}",) for position in POSITIONS},
    "scmoe2": ("moe.position=pos2",),
    "nvidia": ("moe.position=pos1", "moe.combine=direct_add", "moe.after_norm=true"),
    "nous": ("moe.position=pos2", "moe.combine=direct_add"),
}


def usual_rows(every: int) -> tuple[str, ...]:
    """Return the rows that are measured where none are asked for."""
    return tuple(row for row in ROWS[every] if row not in BY_REQUEST and batches_of(row) == 1)


@Parameter(name="*")
@dataclass(frozen=True)
class Setting:
    """A measurement of a row of blocks: one pair, or two in an iteration; or asked_layers blocks.

    share: of communication, reached by a search for the links' rate. compute: real | emulated.
    shaped: whether the links have a rate at all. bus: rows go over the device's bus instead of
    links (emulated.over_the_bus), and the share is reached by its rate. reductions: of the
    gradients, as the Strategy's. dim, ffn_dim, heads: of every block. tokens: of one rank in one
    batch, in sequences of seq_len. accumulate: batches of a training step. rows_per_gradient: the
    ratio for which the tokens were chosen (tokens_for); None: they were given. loads: of the
    experts (loads.py), beside the balanced one, which is always measured.

    Args:
        link_mbit: rate of the links; by default it is searched for the share
        every: blocks with an MoE: every second one, or each one
        top_k: routed experts of a token in rows whose names do not say it; the paper's have 1
        nodes: on which the ranks are; the rate is that of the nodes' network cards
        exchange: between nodes
        layout: dropless | capacity:F | buffers:C (default: capacity:1, and dropless with --load)
        attention_ms: time of an emulated attention
        attention_to_mlp: its ratio to that of an emulated MLP
    """

    share: Annotated[float, INNER] = 0.52
    link_mbit: Positive | None = None
    compute: Annotated[str, INNER] = "emulated"
    level: Literal["block", "iteration"] = "block"
    every: Literal[1, 2] = 2
    rounds: Rounds = 9
    dim: Annotated[int, INNER] = 512
    ffn_dim: Annotated[int, INNER] = 2048
    heads: Annotated[int, INNER] = 8
    tokens: Annotated[int, INNER] = 1024
    seq_len: Count = 256
    accumulate: Annotated[int, INNER] = 1
    rows_per_gradient: Annotated[float | None, INNER] = None
    num_experts: Count = 8
    top_k: Count = 1
    attention_ms: Positive = 45.0
    attention_to_mlp: Positive = 3.0
    shaped: Annotated[bool, INNER] = True
    device: Annotated[str, INNER] = "cpu"
    dtype: Annotated[str, INNER] = "float32"
    bus: Annotated[bool, INNER] = False
    reductions: Annotated[str, INNER] = "paced"
    nodes: Count = 1
    exchange: Literal["flat", "hierarchical", "auto"] = "flat"
    rows: Annotated[tuple[str, ...], INNER] = usual_rows(2)
    loads: Annotated[tuple[str, ...], INNER] = ()
    layout: str | None = None
    asked_layers: Annotated[int | None, INNER] = None

    @property
    def sequences(self) -> int:
        """Sequences of one rank in one batch."""
        return self.tokens // self.seq_len

    @property
    def layers(self) -> int:
        """Blocks of a row."""
        return self.asked_layers or (4 if self.level == "iteration" else 2)

    @property
    def moe_blocks(self) -> int:
        """Blocks of a row that have an MoE."""
        return self.layers // self.every

    def block_of(self, row: str) -> str:
        return ROWS[self.every][row][0]

    def top_k_of(self, block: str) -> int:
        return TOP_K.get(block, self.top_k)


def tokens_for(ratio: float, setting: Setting, ranks: int) -> int:
    """Return the tokens of a batch with which a rank sends so many bytes of rows for a byte of
    dense gradients in a training step of top-2, in whole sequences.

    A block with an MoE sends 2 copies of a token, there and back, forward and backward; a ring
    sends 2 (1 - 1 / R) of the gradients of each block's attention, and of the MLP of a block
    without an MoE."""
    mlps = setting.layers - setting.moe_blocks
    gradients = (
        2
        * (1 - 1 / ranks)
        * (4 * setting.layers * setting.dim**2 + 2 * mlps * setting.dim * setting.ffn_dim)
    )
    copies = 4 * TOP_K["top2"] * setting.moe_blocks * setting.accumulate
    rows_of_a_token = copies * setting.dim * through_link(ranks, setting.nodes)
    return max(1, round(ratio * gradients / rows_of_a_token / setting.seq_len)) * setting.seq_len


def through_link(ranks: int, nodes: int) -> float:
    """Return the rows that leave by a link (a rank's own, or its node's card), over the rows of one
    rank."""
    return 1 - 1 / ranks if nodes == 1 else ranks / nodes * (1 - 1 / nodes)


def pair_of(config: Config, share: float, tokens: int) -> Setting:
    """Return a pair of a configuration's sizes, on which the links' rate is searched. tokens: of
    one rank."""
    model, data = config.model, config.data
    return Setting(
        share,
        every=config.moe.every,
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
        raise ConfigError(
            f"--ranks is {ranks}, allowed: divisors of the {Setting.num_experts} experts from 2 on"
        )


def default_schedule(block: str) -> Schedule:
    """The experts in the middle of the window, in one chunk. block: a block's name in ROWS; of a
    row, the last one."""
    if block in TAPS:
        return Schedule("scmoe", TAPS[block])
    return Schedule(block if block in ("shared_expert", "farskip") else "top_k")
