"""The bound: what a training costs by calculation. Parameters, FLOPs, bytes of collectives, memory
of a rank.

ep ranks share one set of experts, dp such sets are replicas: ep x dp ranks, data parallel over all
of them. Numbers are computed from the model on the meta device, by model_cost.py, memory.py and the
formulas of collectives below. What a rank sends in one training step:

    All-to-All         dispatch and combine of each MoE module, and the gradients of both: 4 times
                       the rows in buffers
    all-reduce         DDP's dense gradients, and the experts' over the ranks that hold the same
                       ones: 8 B a parameter
    all-gather         weights that are split: a block's before forward and before backward, the
                       last one's once
    reduce-scatter     their gradients: 12 B a parameter with the two gathers; 8 B where weights are
                       gathered in bf16
    broadcast          DDP's, of SwinV2's masks and coordinates before each forward
    small ones         routers' sums and the number of targets, the gradient norm, counts of
                       dropless rows

A rank's own share counts too; of N ranks, (N - 1) / N of the bytes travel. An all-reduce sends its
tensor twice.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.moe_block import MoEBlock, moe_blocks_of
from scmoe.models.model_cost import (
    COMPUTE_BYTES,
    WEIGHT_BYTES,
    count_parameters,
    forward_flops,
    moe_uses,
    rows_sent,
    total_and_active,
    training_flops,
)
from scmoe.moe.layout import Buffers, Capacity, buffer_size, expert_capacity
from scmoe.parallel.dense.memory import RankJob, Split, rank_memory

INTEGER = 8  # bytes


def bound(
    model: Any, job: RankJob, by_muon: Collection[nn.Parameter], unit: str, optimizer: str
) -> dict[str, Any]:
    """Return the costs of a training: per token (image), and for one rank.

    model: the whole model, on any device. by_muon: the parameters that Muon updates. unit: token or
    image, of which the FLOPs are. optimizer: its name.
    """
    total, active = total_and_active(count_parameters(model))
    split = Split(model, job)
    experts = sum(p.numel() for p in split.experts)
    replicated = total - experts
    experts_per_rank = experts // job.ep_size
    tokens = 1 if unit == "image" else job.seq_len
    forward = forward_flops(model, job.seq_len)
    sent = transfer_bytes(model, job.precision, job.wire_bytes)
    one_way = all_to_all_bytes(model, job, sent)
    return {
        "ep_size": job.ep_size,
        "dp_size": job.dp_size,
        "precision": job.precision,
        "recompute": job.recompute,
        "optimizer": optimizer,
        "dense": job.dense,
        "samples_per_rank": job.samples,
        "params_total": total,
        "params_active": active,
        "params_per_rank": replicated + experts_per_rank,
        "params_per_rank_experts": experts_per_rank,
        "unit": unit,
        "flops_forward": sum(forward.values()) / tokens,
        "flops_training": training_flops(forward, job.recompute) / tokens,
        "flops_forward_by_kind": {kind: flops / tokens for kind, flops in forward.items()},
        "all_to_all_bytes_per_token_and_transfer": sent,
        "all_to_all_bytes_forward": 2 * (one_way / tokens),
        "all_to_all_bytes_training": 4 * (one_way / tokens),
        "all_to_all_share_that_travels": (job.ep_size - 1) / job.ep_size,
        "memory_bytes": rank_memory(model, job, by_muon),
        "collectives_bytes": step_traffic(split),
        "rows_over_gradients": rows_over_gradients(job, one_way / tokens, tokens, replicated),
    }


def all_to_all_bytes(model: Any, job: RankJob, sent: Sequence[float]) -> float:
    """Return the bytes of one sample in one All-to-All of every MoE module. sent: of a token, for
    each use of a module."""
    rows = model.rows_per_sample(job.seq_len)
    return sum(size * rows[moe] for size, (moe, _) in zip(sent, moe_uses(model), strict=True))


def rows_over_gradients(job: RankJob, one_way: float, tokens: int, replicated: int) -> float | None:
    """Return the bytes of rows that leave a rank in a step over those of dense gradients, which a
    ring of all ranks sums; None for one rank.

    one_way: bytes of a token (image) in one All-to-All of every MoE module. tokens: of a sample.
    replicated: dense parameters.
    """
    if job.ranks == 1:
        return None
    rows = 4 * one_way * tokens * job.samples * job.accumulate * (1 - 1 / job.ep_size)
    gradients = 2 * (1 - 1 / job.ranks) * replicated * WEIGHT_BYTES[job.precision]
    return rows / gradients


def step_traffic(split: Split) -> dict[str, int]:
    """Return bytes by collective and group (`all`: all ranks; the others as Mesh names
    them)."""
    sent, job = Counter[str](), split.job
    if job.ranks == 1:
        return {}
    blocks = moe_blocks_of(split.model)
    rows = split.model.rows_per_sample(job.seq_len)
    for block in blocks if job.ep_size > 1 else ():
        num_rows, counts = rows_of_batches(block, job, rows[block.moe])
        width = job.wire_bytes or job.compute_bytes
        size = 4 * num_rows * block.moe.experts.w_in_eDF.shape[1] * width * job.accumulate
        sent["all_to_all ep"] += size
        sent["all_gather counts"] += counts * INTEGER * job.accumulate
    # of each router, and the number of targets
    sums = sum(block.moe.router.num_experts + 2 for block in blocks) + 1
    losses = 3 if blocks else 1  # the task's, and the routers' two
    # the losses, and the gradient norm
    scalars = max(4, WEIGHT_BYTES[job.precision]) * (losses * job.accumulate + 1)
    sent["all_reduce all"] += 2 * (sums * INTEGER * job.accumulate + scalars)
    if job.dense == "replicated":
        sent["broadcast all"] += (
            sum(buffer.nbytes for buffer in split.model.buffers()) * job.accumulate
        )
    for p in split.model.parameters():
        add_weight(split, p, sent)
    return {name: size for name, size in sent.items() if size}


def add_weight(split: Split, p: nn.Parameter, sent: Counter[str]) -> None:
    """Add what a parameter and its gradient send."""
    if not p.requires_grad:
        return
    is_expert = p in split.experts
    shards = split.shards(p)
    job = split.job
    copies = (job.dp_size if is_expert else job.ranks) // shards
    if job.dense == "replicated":
        if copies > 1:
            # beside an expert's gradient travels whether this rank has used it
            numbers = split.held(p) + (1 if is_expert else 0)
            group = "edp" if is_expert else "all"
            sent[f"all_reduce {group}"] += 2 * numbers * split.bytes_of(p)
        return
    mesh = "exact" if job.precision.startswith("bf16") and p in split.exact else "dense"
    group = "edp" if is_expert else f"{mesh}-shards"
    if shards > 1:
        # backward begins with the last block
        gathers = 1 if p in split.outside or p in split.blocks[-1] else 2
        sent[f"all_gather {group}"] += gathers * split.gathered_bytes(p) * job.accumulate
        sent[f"reduce_scatter {group}"] += split.summed_bytes(p) * job.accumulate
    if copies > 1:
        sent[f"all_reduce {mesh}-copies"] += 2 * split.summed_bytes(p) // shards * job.accumulate


def rows_of_batches(block: MoEBlock, job: RankJob, per_sample: float) -> tuple[int, int]:
    """Return what `rows_of_block` does, summed over the batches in flight. per_sample: tokens of a
    sample that the block gets."""
    parts = [
        rows_of_block(block, round(samples * per_sample), job.ep_size)
        for samples in job.samples_at_once
    ]
    return sum(rows for rows, _ in parts), sum(counts for _, counts in parts)


def rows_of_block(block: MoEBlock, tokens: int, ep_size: int) -> tuple[int, int]:
    """Return the rows of one transfer and the announced counts, summed over a block's gates."""
    moe, chunks = block.moe, block.schedule.chunks
    num_experts = moe.router.num_experts
    num_ids = moe.router.num_ids
    top_k = moe.router.top_k
    gates = 2 if isinstance(block, DoubleGateBlock) else 1
    if isinstance(moe.rows, Buffers):
        part = math.ceil(buffer_size(tokens, top_k, ep_size, moe.rows.ceiling) / chunks)
        return gates * chunks * ep_size * part, gates * ep_size * chunks * num_experts
    if isinstance(moe.rows, Capacity) and not moe.rows.filled:
        capacity = expert_capacity(tokens, num_ids, top_k, moe.rows.factor)
        return gates * chunks * num_experts * math.ceil(capacity / chunks), 0
    real = round(tokens * top_k * num_experts / num_ids)  # if the load is even
    return gates * real, gates * ep_size * chunks * num_experts  # with a capacity, at most


def transfer_bytes(model: nn.Module, precision: str, wire_bytes: int | None = None) -> list[float]:
    """Return the bytes of a token in one All-to-All, for each use of an MoE module; bytes that stay
    on their rank included.

    Forward has two All-to-Alls, dispatch and combine, and backward two more of the same size. A
    token's own rank holds one in EP of the experts, so (EP - 1) / EP of the bytes travel where the
    load is even. wire_bytes: of an element between ranks; None: those of the type that is computed
    in.
    """
    width = wire_bytes or COMPUTE_BYTES[precision]
    return [
        rows_sent(moe, copies) * moe.experts.w_in_eDF.shape[1] * width
        for moe, copies in moe_uses(model)
    ]
