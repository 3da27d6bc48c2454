"""A ScMoE block and an MoE module from numbers, for anyone's nn.Module, on one rank or many.

    block = scmoe.ScMoEBlock(dim=256, heads=8, num_experts=8, top_k=1, position="pos2")
    y_BSD, stats = block(x_BSD)

The functions put the classes of blocks/ and moe/ together as training/assembly/ does for a GPT.
Other parts (rotary positions, another norm) are given to those classes. `stats` are what
`load_balance_loss` and `move_biases` read.

group: a process group of torch.distributed whose ranks share the experts and train on batches of
their own; None: this process holds all experts. Every rank calls the function, with the same seed.
MoE and ScMoEBlock also take the Strategy's `self.wire`.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.farskip import FarSkipBlock
from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.moe import balance, stream
from scmoe.moe.coefficient import COEFFICIENT_GATES
from scmoe.moe.experts import ACTIVATIONS, Experts
from scmoe.moe.layout import rows_of
from scmoe.moe.router import SCORINGS, Router, Scoring
from scmoe.moe.stream import MoEStream
from scmoe.moe.tokens import RouterStats
from scmoe.parallel.mesh import Mesh, check_experts, expert_parameters
from scmoe.parallel.update.wrap import wrap
from scmoe.parallel.wire.dispatchers import make_dispatcher
from scmoe.parallel.wire.wire import Wire
from scmoe.schedule.schedule import POSITIONS, SUBLAYERS, Schedule


@dataclass(frozen=True)
class Wiring:
    """The parts of a block with a shortcut.

    position, combine: the defaults; None: there is nothing to choose. positions, combines: the
    allowed values.
    """

    block: type[MoEBlock]
    sublayers: tuple[str, ...]
    position: str | None = None
    combine: str | None = None
    positions: tuple[str, ...] = ()
    combines: tuple[str, ...] = ()
    shares_norm: bool = False  # the tap's, with the sub-layer after it
    norm_after: bool = False  # of the sum of shared and routed output


PAIR = SUBLAYERS
BLOCK = SUBLAYERS[:1]
ANY_POSITION = tuple(POSITIONS)
ANY_GATE = tuple(COEFFICIENT_GATES)
ADDED = ("direct_add",)
SHORTCUTS = {  # docs/shortcuts.md compares them
    "scmoe": Wiring(ShortcutBlock, PAIR, "pos2", "cg1", ANY_POSITION, ANY_GATE),
    "longcat": Wiring(
        ShortcutBlock, PAIR, "pos2", "direct_add", ("pos2",), ADDED, shares_norm=True
    ),
    "nvidia": Wiring(ShortcutBlock, BLOCK, "pos1", "direct_add", ("pos1",), ADDED, norm_after=True),
    "nous": Wiring(ShortcutBlock, BLOCK, "carried", "direct_add", ("first", "carried"), ADDED),
    "farskip": Wiring(FarSkipBlock, BLOCK),
    "dgmoe": Wiring(DoubleGateBlock, PAIR, "pos2", None, ANY_POSITION),
}


def MoE(
    dim: int,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    ffn_dim: int | None = None,
    activation: str = "gelu",
    capacity_factor: float | None = None,
    router: str | Scoring = "softmax",
    zero_experts: int = 0,
    group: Any = None,
) -> MoEStream:
    """Return sum_i G(x)_i E_i(x) (Eq. 1), called as y, stats = moe(x) for x of [..., dim].

    ffn_dim: None: 4 dim. activation: gelu | gelu_tanh | swiglu. capacity_factor: None: no token is
    dropped. router: softmax | deepseek | longcat, or a `Scoring` of your own. A router with a
    selection bias needs `move_biases` after each update. A router with a loss per sequence
    (deepseek) needs x of [batch, sequence, dim]. zero_experts: further experts that compute nothing
    and return their input.
    """
    scoring = SCORINGS[_chosen("router", router, SCORINGS)] if isinstance(router, str) else router
    _chosen("activation", activation, ACTIVATIONS)
    wire = wire_of(group)
    ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
    gate = Router(dim, num_experts, top_k, scoring=scoring, zero_experts=zero_experts)
    experts = Experts(dim, ffn_dim, num_experts, wire.mesh.local_experts(num_experts), activation)
    dispatcher, rows = make_dispatcher(wire, num_experts), rows_of(capacity_factor)
    return MoEStream(gate, experts, dispatcher, rows)


def ScMoEBlock(
    dim: int,
    heads: int,
    num_experts: int = 8,
    top_k: int = 1,
    position: str | None = None,
    combine: str | None = None,
    *,
    shortcut: str = "scmoe",
    ffn_dim: int | None = None,
    capacity_factor: float | None = None,
    router: str | Scoring = "softmax",
    zero_experts: int = 0,
    dropout: float = 0.0,
    expert_slot: int | None = None,
    chunks: int = 1,
    inside_attention: bool = False,
    group: Any = None,
) -> MoEBlock:
    """Return a pair of Transformer blocks, or for nvidia, nous and farskip one block, whose experts
    read an earlier layer (Eq. 7-10). They are causal and pre-norm.

    It is called as y, stats = block(x) for x of [batch, sequence, dim]. farskip and nous also
    return what the next block needs: y, stats, carry = block(x, carry=carry). farskip's first block
    needs no carry; that of nous has position="first", and the others "carried".

    shortcut: scmoe | longcat | nvidia | nous | farskip | dgmoe. position: pos1 | pos2 | pos3.
    combine: direct_add | cg1 | cg2. None: the shortcut's default, such as pos2 and cg1 for scmoe.
    router, zero_experts: as for `MoE`. expert_slot, chunks, inside_attention: as for
    `Schedule`. Raises ValueError if the shortcut has no such position, combination or number of
    experts.
    """
    wiring = SHORTCUTS[_chosen("shortcut", shortcut, SHORTCUTS)]
    tap = wiring.position if position is None else _chosen("position", position, wiring.positions)
    gate = wiring.combine if combine is None else _chosen("combine", combine, wiring.combines)
    schedule = Schedule(wiring.block.architecture, tap, expert_slot, chunks, inside_attention)
    ffn_dim = 4 * dim if ffn_dim is None else ffn_dim

    parts = {"attention": lambda: Attention(dim, heads), "mlp": lambda: MLP(dim, ffn_dim)}
    sublayers = [
        Residual(nn.LayerNorm(dim), parts[name](), nn.Dropout(dropout)) for name in wiring.sublayers
    ]
    norm = nn.LayerNorm(dim)
    moe = MoE(
        dim,
        num_experts,
        top_k,
        ffn_dim=ffn_dim,
        capacity_factor=capacity_factor,
        router=router,
        zero_experts=zero_experts,
        group=group,
    )

    after: nn.Module = nn.Dropout(dropout)
    if wiring.norm_after:
        after = nn.Sequential(OrderedDict(norm=nn.LayerNorm(dim), after=after))
    tap_norm = None
    if wiring.shares_norm:
        tap_norm = sublayers[len(sublayers) - schedule.sublayers_after_tap].norm
    elif tap is not None:
        tap_norm = nn.LayerNorm(dim)
    return wiring.block(
        sublayers,
        norm,
        moe,
        schedule,
        after,
        tap_norm=tap_norm,
        shared_expert=MLP(dim, ffn_dim) if "shared_expert" in schedule.window else None,
        coefficient=None if gate is None else COEFFICIENT_GATES[gate](dim),
    )


def _chosen(name: str, value: str, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed: {' | '.join(allowed) or 'None'}")
    return value


def move_biases(module: nn.Module, stats: Sequence[RouterStats], group: Any = None) -> None:
    """Move the selection biases of all routers in a module. Call it after each update, on every
    rank.

    stats: of the MoE modules in their order, of the step's one batch. group: as for
    `load_balance_loss`.
    """
    stream.move_biases(module, _global_sums(stats, group))


def load_balance_loss(stats: Sequence[RouterStats], group: Any = None) -> Tensor:
    """Return the mean over modules of E sum_i f_i P_i: 1 for an even load, E where one expert takes
    all.

    group: the ranks whose batches make the global batch, each of which calls this; a `Wire`: all
    ranks; None: this process alone. The mean over the ranks is the loss of the global batch.
    """
    sums_LE2 = _global_sums(stats, group)
    return balance.load_balance_loss([*stats], sums_LE2, wire_of(group).mesh.world_size)


def _global_sums(stats: Sequence[RouterStats], group: Any) -> Tensor:
    """Return the routers' integer sums, added up over the ranks of a group or wire."""
    sums_LE2 = balance.integer_sums([*stats])
    wire = wire_of(group)
    if wire.mesh.world_size > 1:
        dist.all_reduce(sums_LE2, group=None if group is wire else group)
    return sums_LE2


def data_parallel(module: nn.Module, group: Any) -> DistributedDataParallel:
    """Return the module in DDP over the group that shares its experts.

    After backward every gradient is that of the mean of the ranks' losses. Keep the returned module
    until backward has ended: as with any DDP module, nothing is summed without it. A
    LightningModule needs `ExpertParallelStrategy` instead, which does this too. Raises ValueError
    if the experts of the module do not belong to this rank of the group.
    """
    has_experts = any(True for _ in expert_parameters(module))
    if group is None and dist.get_world_size() > 1 and has_experts:
        raise ValueError(
            "group is None on several ranks. Give the group that shares the experts. If every rank"
            " has all experts, use DistributedDataParallel."
        )
    mesh = wire_of(group).mesh
    check_experts(module, mesh)
    ddp = wrap(module, mesh, process_group=group).module
    assert isinstance(ddp, DistributedDataParallel)
    return ddp


def wire_of(group: Any) -> Wire:
    """Return the wire of this rank in a group that shares one set of experts. A wire is returned as
    it is."""
    if group is None:
        return Wire()
    if isinstance(group, Wire):
        return group
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("This rank is not in the group. Give a group that has this rank, or None.")
    return Wire(Mesh(rank, size, size, ep_group=group))
