"""The rows of blocks that the benches measure.

    every 2    a pair, Block-MLP and Block-MoE, as in the paper
    every 1    two blocks with an MoE each: the wirings of NVIDIA, NousResearch and FarSkip beside
               the baselines. Two blocks, because those of NousResearch and FarSkip read what the
               preceding block hands on

Nothing here imports torch, so the command line reads it.
"""

from dataclasses import replace

from experiments.bench.two_batches import rows_in_halves
from scmoe.blocks.wirings import WIRINGS, Wiring
from scmoe.predict.row_names import PIPELINED, batches_of
from scmoe.schedule.schedule import POSITIONS, Schedule

# by the suffix of a row's name: numbers of chunks to choose from
CHUNKS_BY_SUFFIX = {"": (1,), PIPELINED: (2, 4)}
BASELINES = {
    name + suffix: (name, CHUNKS_BY_SUFFIX[suffix])
    for name in ("top2", "top1", "shared_expert")
    for suffix in CHUNKS_BY_SUFFIX
}
EVERY_BLOCK_ROWS = {"scmoe_pos1": "nvidia", "scmoe_pos2": "nous", "farskip": "farskip"}
BY_REQUEST = ("top3", "scmoe2")  # Table 4's; scmoe2 routes each token to two experts, at Pos-2
RowsOfBlocks = dict[str, tuple[str, tuple[int, ...]]]  # row: (block, numbers of chunks)
ROWS: dict[int, RowsOfBlocks] = {  # by `every`
    2: {
        **BASELINES,
        **{
            f"scmoe_{position}{suffix}": (position, CHUNKS_BY_SUFFIX[suffix])
            for suffix in CHUNKS_BY_SUFFIX
            for position in POSITIONS
        },
        **{name: (name, CHUNKS_BY_SUFFIX[""]) for name in BY_REQUEST},
    },
    1: {
        **BASELINES,
        **{
            row + suffix: (block, CHUNKS_BY_SUFFIX[suffix])
            for suffix in CHUNKS_BY_SUFFIX
            for row, block in EVERY_BLOCK_ROWS.items()
        },
    },
}
for _rows in ROWS.values():
    _rows.update(rows_in_halves(_rows))
# routed experts of a token; other blocks have Setting.top_k
BLOCK_TOP_K = {"top1": 1, "top2": 2, "top3": 3, "scmoe2": 2}
# of each block, without K
WIRING_OF: dict[str, Wiring] = {
    **dict.fromkeys(("top1", "top2", "top3"), WIRINGS["top_k"]),
    **{name: WIRINGS[name] for name in ("shared_expert", "nvidia", "nous", "farskip")},
    **{position: replace(WIRINGS["scmoe"], position=position) for position in POSITIONS},
    "scmoe2": WIRINGS["scmoe"],
}


def usual_rows(every: int) -> tuple[str, ...]:
    """Return the rows that are measured where none are asked for."""
    return tuple(row for row in ROWS[every] if row not in BY_REQUEST and batches_of(row) == 1)


def default_schedule(block: str) -> Schedule:
    """Return the schedule with the experts in the middle of the window, in one chunk.

    block: a block's name in ROWS; of a row, the last one.
    """
    wiring = WIRING_OF[block]
    return Schedule(wiring.architecture, wiring.taps[1])
