"""The rows of a bench or an advice in words, for charts and pages.

    NAME              an architecture, such as top2, shared_expert, scmoe_pos2
    NAME_pipelined    the same in chunks
    NAME_two          the same with two batches in flight

Nothing here imports torch, so the command line reads it.
"""

TWO = "_two"
PIPELINED = "_pipelined"
ARCHITECTURE_NAMES = {
    **{f"top{k}": f"Standard top-{k}" for k in range(1, 33)},
    "shared_expert": "Shared-expert",
    "scmoe2": "ScMoE-2",
    **{f"scmoe_pos{i}": f"ScMoE (Pos-{i})" for i in (1, 2, 3)},
    "farskip": "FarSkip",
}
IN_EVERY_BLOCK = {  # wirings with an MoE in every block
    "scmoe_pos1": "NVIDIA (Pos-1)",
    "scmoe_pos2": "Nous (Pos-2)",
}


def batches_of(row: str) -> int:
    """Return the batches in flight of a row."""
    return 2 if row.removesuffix(PIPELINED).endswith(TWO) else 1


def architecture_of(row: str) -> str:
    """Return the row of the same blocks in one chunk, with one batch in flight."""
    return row.removesuffix(PIPELINED).removesuffix(TWO)


def name_of(row: str, every: int = 2) -> str:
    """Return the paper's name of a row's architecture, such as `ScMoE (Pos-2)` for
    scmoe_pos2_pipelined. every: 1 for an MoE in every block, 2 for pairs."""
    return (ARCHITECTURE_NAMES | IN_EVERY_BLOCK if every == 1 else ARCHITECTURE_NAMES)[
        architecture_of(row)
    ]


def way_of_row(row: str) -> str:
    """Return what a label says of a row beside its name."""
    batches = ", two batches in flight" if batches_of(row) == 2 else ""
    return batches + (", pipelined" if row.endswith(PIPELINED) else "")


def row_in_words(row: str, every: int = 2) -> str:
    """Return a row's name and the way that it runs; a name that is none of these stays."""
    if architecture_of(row) not in ARCHITECTURE_NAMES:
        return row
    return name_of(row, every) + way_of_row(row)
