"""Bytes that a rank sends in the collectives of one training step, from the model's modules. Nothing is run.

    All-to-All         dispatch and combine of each MoE module, and the gradients of both: 4 times the rows in buffers
    all-reduce         DDP's dense gradients, and the experts' over the ranks that hold the same ones: 8 B a parameter
    all-gather         weights that are split: a block's before forward and before backward, the last one's once
    reduce-scatter     their gradients: 12 B a parameter with the two gathers; 8 B where weights are gathered in bf16
    broadcast          DDP's, of SwinV2's masks and coordinates before each forward
    small ones         routers' sums and the number of targets, losses, the gradient norm, counts of dropless rows

A rank's own share counts too; of N ranks, (N - 1) / N of the bytes travel. An all-reduce sends its tensor twice.
"""

import math
from collections import Counter

from torch import nn

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.moe_block import MoEBlock, moe_blocks_of
from scmoe.footprint.model_cost import COMPUTE_BYTES
from scmoe.footprint.split import Split
from scmoe.moe.layout import buffer_size, expert_capacity

INTEGER = 8  # bytes


def step_traffic(
    split: Split, *, seq_len: int, samples: int, accumulate: int = 1, wire_bytes: int | None = None
) -> dict[str, int]:
    """Return bytes by collective and group (`all`: all ranks; the others as ParallelContext names them).

    samples: of a rank in one batch. wire_bytes: of a number that is sent between experts; None: as it is computed."""
    sent: Counter[str] = Counter()
    if split.ep_size * split.dp_size == 1:
        return {}
    blocks = moe_blocks_of(split.model)
    rows = split.model.rows_per_sample(seq_len)
    for block in blocks if split.ep_size > 1 else ():
        num_rows, counts = rows_of_block(block, round(samples * rows[block.moe]), split.ep_size)
        width = wire_bytes or COMPUTE_BYTES[split.precision]
        sent["all_to_all ep"] += 4 * num_rows * block.moe.experts.w_in_eDF.shape[1] * width * accumulate
        sent["all_gather counts"] += counts * INTEGER * accumulate
    sums = sum(block.moe.router.num_experts + 2 for block in blocks) + 1  # of each router, and the number of targets
    losses = 3 if blocks else 1  # the task's, and the routers' two
    sent["all_reduce all"] += 2 * (sums * INTEGER * accumulate + max(4, split.width) * (losses * accumulate + 1))
    if split.dense == "replicated":
        sent["broadcast all"] += sum(buffer.nbytes for buffer in split.model.buffers()) * accumulate
    for p in split.model.parameters():
        add_weight(split, p, sent, accumulate)
    return {name: size for name, size in sent.items() if size}


def add_weight(split: Split, p: nn.Parameter, sent: Counter[str], accumulate: int) -> None:
    """Add what a parameter and its gradient send."""
    is_expert, shards = p in split.experts, split.shards(p)
    copies = (split.dp_size if is_expert else split.ep_size * split.dp_size) // shards
    if split.dense == "replicated":
        sent["all_reduce edp" if is_expert else "all_reduce all"] += 2 * (copies > 1) * split.held(p) * split.width
        return
    mesh = "exact" if split.precision == "bf16-mixed" and p in split.exact else "dense"
    group = "edp" if is_expert else f"{mesh}-shards"
    if shards > 1:
        sent[f"all_gather {group}"] += (1 + (p in split.gathered_twice)) * split.gathered_bytes(p) * accumulate
        sent[f"reduce_scatter {group}"] += split.summed_bytes(p) * accumulate
    if copies > 1:
        sent[f"all_reduce {mesh}-copies"] += 2 * split.summed_bytes(p) // shards * accumulate


def rows_of_block(block: MoEBlock, tokens: int, ep_size: int) -> tuple[int, int]:
    """Return the rows of one transfer, summed over the gates of a block, and the announced counts."""
    moe, chunks = block.moe, block.schedule.chunks
    num_experts, top_k = moe.router.num_experts, moe.router.top_k
    gates = 2 if isinstance(block, DoubleGateBlock) else 1
    if moe.buffer is not None:
        part = math.ceil(buffer_size(tokens, top_k, ep_size, moe.buffer) / chunks)
        return gates * chunks * ep_size * part, gates * ep_size * chunks * num_experts
    if moe.capacity_factor is None or moe.filled:  # as many as there are; with a capacity, at most
        return gates * tokens * top_k, gates * ep_size * chunks * num_experts
    capacity = expert_capacity(tokens, num_experts, top_k, moe.capacity_factor)
    return gates * chunks * num_experts * math.ceil(capacity / chunks), 0
