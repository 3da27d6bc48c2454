"""The rows of blocks, and the setting of a measurement of them.

    every 2    a pair, Block-MLP and Block-MoE, as in the paper
    every 1    two blocks with an MoE each: the wirings of NVIDIA, NousResearch and FarSkip beside
               the baselines. There are two because the last two of these read what the block before
               hands on

Nothing here imports torch, so the command line reads it.
"""

from dataclasses import dataclass, replace

from experiments.bench.two_batches import rows_in_halves
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.predict.row_names import batches_of
from scmoe.schedule.schedule import POSITIONS, Schedule

# bytes of rows for a byte of gradients in an iteration; the paper's: docs/results/method.md
USUAL_RATIO = 3.0
# by the suffix of a row's name: numbers of chunks to choose from
CHUNKS = {"": (1,), "_pipelined": (2, 4)}
BASELINES = {
    name + suffix: (name, CHUNKS[suffix])
    for name in ("top2", "top1", "shared_expert")
    for suffix in CHUNKS
}
IN_EVERY_BLOCK = {"scmoe_pos1": "nvidia", "scmoe_pos2": "nous", "farskip": "farskip"}
BY_REQUEST = ("top3", "scmoe2")  # Table 4's; scmoe2 routes each token to two experts, at Pos-2
RowsOfBlocks = dict[str, tuple[str, tuple[int, ...]]]  # row: (block, numbers of chunks)
ROWS: dict[int, RowsOfBlocks] = {  # by `every`
    2: {
        **BASELINES,
        **{
            f"scmoe_{position}{suffix}": (position, CHUNKS[suffix])
            for suffix in CHUNKS
            for position in POSITIONS
        },
        **{name: (name, CHUNKS[""]) for name in BY_REQUEST},
    },
    1: {
        **BASELINES,
        **{
            row + suffix: (block, CHUNKS[suffix])
            for suffix in CHUNKS
            for row, block in IN_EVERY_BLOCK.items()
        },
    },
}
for _rows in ROWS.values():
    _rows.update(rows_in_halves(_rows))
# routed experts of a token; other blocks have Setting.top_k
TOP_K = {"top1": 1, "top2": 2, "top3": 3, "scmoe2": 2}
TAPS = {
    **{position: position for position in POSITIONS},
    "scmoe2": "pos2",
    "nvidia": "pos1",
    "nous": "carried",
}
# block: what a configuration says of it (docs/shortcuts.md), without `every` and K
WIRINGS: dict[str, tuple[str, ...]] = {
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


@dataclass(frozen=True)
class Setting:
    """A measurement of a row of blocks: one pair, or two in an iteration; or asked_layers blocks.

    share: of communication, reached by a search for the links' rate; link_mbit: a given rate
    instead. compute: real | emulated. shaped: whether the links have a rate at all. bus: rows go
    over the device's bus instead of links (emulated.over_the_bus), and the share is reached by its
    rate. every: blocks with an MoE, every second one or each one. dim, ffn_dim, heads, head_dim: of
    every block. tokens: of one rank in one batch, in sequences of seq_len. accumulate: batches of a
    training step. rows_per_gradient: the ratio for which the tokens were chosen (tokens_for); None:
    they were given. attention_ms: of an emulated attention, attention_to_mlp: its ratio to that of
    an emulated MLP. loads: of the experts (scmoe/loads.py), beside the balanced one, which
    is always measured. layout: None: capacity:1, and dropless with loads. tries: of one planning at
    most; None: as in a training.

    The defaults are those of a block.
    """

    share: float = 0.52
    link_mbit: float | None = None
    ranks: int = 2
    compute: str = "emulated"
    level: str = "block"
    every: int = 2
    rounds: int = 9
    dim: int = 512
    ffn_dim: int = 2048
    heads: int = 8
    head_dim: int | None = None
    tokens: int = 1024
    seq_len: int = 256
    accumulate: int = 1
    rows_per_gradient: float | None = None
    num_experts: int = 8
    top_k: int = 1
    attention_ms: float = 45.0
    attention_to_mlp: float = 3.0
    shaped: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    bus: bool = False
    rows: tuple[str, ...] = usual_rows(2)
    loads: tuple[str, ...] = ()
    layout: str | None = None
    tries: int | None = None
    asked_layers: int | None = None

    @classmethod
    def block(cls) -> "Setting":
        """Return the usual measurement of one pair."""
        return cls()

    @classmethod
    def iteration(cls) -> "Setting":
        """Return the usual measurement of a training step of two pairs, smaller ones."""
        usual = cls(level="iteration", dim=256, ffn_dim=1024, heads=4)
        return replace(usual, tokens=tokens_for(USUAL_RATIO, usual), rows_per_gradient=USUAL_RATIO)

    def on_gpu(self) -> "Setting":
        """Return the same on one GPU: real operators, and gradients reduced by DDP."""
        return replace(self, device="cuda", ranks=1, compute="real")

    @property
    def sequences(self) -> int:
        """Return the sequences of one rank in one batch."""
        return self.tokens // self.seq_len

    @property
    def layers(self) -> int:
        """Return the number of blocks of a row."""
        return self.asked_layers or (4 if self.level == "iteration" else 2)

    @property
    def moe_blocks(self) -> int:
        """Return the number of blocks of a row that have an MoE."""
        return self.layers // self.every

    def block_of(self, row: str) -> str:
        """Return the block of a row (ROWS)."""
        return ROWS[self.every][row][0]

    def top_k_of(self, block: str) -> int:
        """Return the routed experts of a token in a block."""
        return TOP_K.get(block, self.top_k)


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
    copies = 4 * TOP_K["top2"] * setting.moe_blocks * setting.accumulate
    rows_of_a_token = copies * setting.dim * share_sent(ranks)
    sequences = max(1, round(ratio * gradients / rows_of_a_token / setting.seq_len))
    return sequences * setting.seq_len


def share_sent(ranks: int) -> float:
    """Return the share of a rank's rows that leave it, at balanced routing."""
    return 1 - 1 / ranks


def pair_of(config: Config, share: float, ranks: int, tokens: int) -> Setting:
    """Return a pair of a configuration's sizes, on which the links' rate is searched.

    tokens: of one rank.
    """
    model, data = config.model, config.data
    return Setting(
        share,
        ranks=ranks,
        every=config.moe.every,
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


def check_ranks(ranks: int) -> None:
    """Raise ConfigError for a number of ranks that cannot share the usual number of experts."""
    if ranks < 2 or Setting.num_experts % ranks:
        raise ConfigError(
            f"--ranks is {ranks}, allowed: divisors of the {Setting.num_experts} experts from 2 on"
        )


def default_schedule(block: str) -> Schedule:
    """Return the schedule with the experts in the middle of the window, in one chunk.

    block: a block's name in ROWS; of a row, the last one.
    """
    if block in TAPS:
        return Schedule("scmoe", TAPS[block])
    return Schedule(block if block in ("shared_expert", "farskip") else "top_k")
