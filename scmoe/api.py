"""A ScMoE block and an MoE module from numbers, for anyone's nn.Module, on one rank or many.

    block = scmoe.ScMoEBlock(dim=256, heads=8, num_experts=8, top_k=1, position="pos2", combine="cg1")
    y_BSD, stats = block(x_BSD)

The functions put the classes of blocks/ and moe/ together as training/assembly/ does for a GPT. Other parts (rotary
positions, another norm) are given to those classes. `stats` are what `load_balance_loss` reads.

group: a process group of torch.distributed whose ranks share the experts and train on batches of their own; None: this
process holds all experts. Every rank calls the function, with the same seed. Rows travel flat between the ranks of a
group. MoE and ScMoEBlock also take the Strategy's `parallel_context`; then they travel as its `exchange` says.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.moe import balance
from scmoe.moe.coefficient import COEFFICIENT_GATES
from scmoe.moe.experts import ACTIVATIONS, Experts
from scmoe.moe.layout import rows_of
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.moe.tokens import RouterStats
from scmoe.parallel.mesh import ParallelContext, check_experts, expert_parameters
from scmoe.parallel.update.wrap import wrap
from scmoe.schedule.schedule import POSITIONS, SUBLAYERS, Schedule


def MoE(
    dim: int,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    ffn_dim: int | None = None,
    activation: str = "gelu",
    capacity_factor: float | None = None,
    group: Any = None,
) -> MoEStream:
    """Return sum_i G(x)_i E_i(x) (Eq. 1), called as y, stats = moe(x) for x of [..., dim].

    ffn_dim: None: 4 dim. activation: gelu | gelu_tanh | swiglu. capacity_factor: None: no token is dropped.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, allowed: {' | '.join(ACTIVATIONS)}")
    context = context_of(group)
    ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
    router, rows = Router(dim, num_experts, top_k), rows_of(capacity_factor)
    experts = Experts(dim, ffn_dim, num_experts, context.local_experts(num_experts), activation)
    return MoEStream(router, experts, context.dispatcher(num_experts), rows)


def ScMoEBlock(
    dim: int,
    heads: int,
    num_experts: int = 8,
    top_k: int = 1,
    position: str = "pos2",
    combine: str = "cg1",
    *,
    ffn_dim: int | None = None,
    capacity_factor: float | None = None,
    dropout: float = 0.0,
    expert_slot: int | None = None,
    chunks: int = 1,
    inside_attention: bool = False,
    group: Any = None,
) -> ShortcutBlock:
    """Return a pair of Transformer blocks, causal and pre-norm, whose experts read the tap (Eq. 7-10).

    It is called as y, stats = block(x) for x of [batch, sequence, dim].
    position: pos1 | pos2 | pos3. combine: direct_add | cg1 | cg2. expert_slot, chunks,
    inside_attention: those of `Schedule`.
    """
    if position not in POSITIONS:  # the others need a block before
        raise ValueError(f"position is {position!r}, allowed: {' | '.join(POSITIONS)}")
    if combine not in COEFFICIENT_GATES:
        raise ValueError(f"combine is {combine!r}, allowed: {' | '.join(COEFFICIENT_GATES)}")
    ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
    parts = {"attention": lambda: Attention(dim, heads), "mlp": lambda: MLP(dim, ffn_dim)}
    return ShortcutBlock(
        [Residual(nn.LayerNorm(dim), parts[name](), nn.Dropout(dropout)) for name in SUBLAYERS],
        nn.LayerNorm(dim),
        MoE(dim, num_experts, top_k, ffn_dim=ffn_dim, capacity_factor=capacity_factor, group=group),
        Schedule("scmoe", position, expert_slot, chunks, inside_attention),
        nn.Dropout(dropout),
        tap_norm=nn.LayerNorm(dim),
        shared_expert=MLP(dim, ffn_dim),
        coefficient=COEFFICIENT_GATES[combine](dim),
    )


def load_balance_loss(stats: Sequence[RouterStats], group: Any = None) -> Tensor:
    """Return the mean over modules of E sum_i f_i P_i: 1 for an even load, E where one expert takes all.

    group: the ranks whose batches make the global batch, each of which calls this; a `ParallelContext`: all ranks;
    None: this process alone. The mean over the ranks is the loss of the global batch.
    """
    sums_LE2, context = balance.integer_sums([*stats]), context_of(group)
    if context.world_size > 1:
        dist.all_reduce(sums_LE2, group=None if group is context else group)
    return balance.load_balance_loss([*stats], sums_LE2, context.world_size)


def data_parallel(module: nn.Module, group: Any) -> DistributedDataParallel:
    """Return the module in DDP over the group that shares its experts: after backward every gradient is that of the
    mean of the ranks' losses. Keep it until backward has ended: as with any DDP module, nothing is summed without it.
    A LightningModule needs `ExpertParallelStrategy` instead, which does this too.

    ValueError: the experts of the module do not belong to this rank of the group."""
    if group is None and dist.get_world_size() > 1 and any(True for _ in expert_parameters(module)):
        own = "the group that shares the experts; if every rank has all experts, DistributedDataParallel is enough"
        raise ValueError(f"group is None on several ranks, allowed: {own}")
    context = context_of(group)
    check_experts(module, context)
    ddp = wrap(module, context, "ddp", process_group=group).module
    assert isinstance(ddp, DistributedDataParallel)
    return ddp


def context_of(group: Any) -> ParallelContext:
    """Return the place of this rank in a group that shares one set of experts; of a context, the context."""
    if group is None:
        return ParallelContext()
    if isinstance(group, ParallelContext):
        return group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("this rank is not in the group that was given, allowed: a group with this rank, or None")
    return ParallelContext(rank, size, size, ep_group=group)
