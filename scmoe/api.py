"""A ScMoE block and an MoE module from numbers, for anyone's nn.Module, on one rank or many.

    block = scmoe.ScMoEBlock(dim=256, heads=8, num_experts=8, top_k=1, position="pos2")
    y_BSD, stats = block(x_BSD)

A block is built by blocks/build.py, as that of a GPT in a training; its wiring is a row of
blocks/wirings.py: scmoe, longcat, nvidia, nous, farskip, dgmoe. Other parts (rotary positions,
another norm) are given to the classes of blocks/ and moe/. `stats` are what
`load_balance_loss` and `move_biases` read.

group: a process group of torch.distributed whose ranks share the experts and train on batches of
their own; None: this process holds all experts. Every rank calls the function, with the same seed.
MoE and ScMoEBlock also take the Strategy's `self.wire`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scmoe.blocks.build import BLOCKS, Parts, wired_block
from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.sublayers import MLP, Attention
from scmoe.blocks.wirings import WIRINGS
from scmoe.moe import balance, stream
from scmoe.moe.coefficient import COEFFICIENT_GATES
from scmoe.moe.experts import ACTIVATIONS, Experts
from scmoe.moe.layout import choose_rows
from scmoe.moe.router import SCORINGS, Router, Scoring
from scmoe.moe.stream import MoEStream
from scmoe.moe.tokens import RouterStats
from scmoe.parallel.mesh import Mesh, check_experts, expert_parameters
from scmoe.parallel.update.wrap import wrap
from scmoe.parallel.wire.dispatchers import make_dispatcher
from scmoe.parallel.wire.wire import Wire
from scmoe.schedule.schedule import POSITIONS, Schedule

SHORTCUT_NAMES = [name for name in WIRINGS if name not in ("top_k", "shared_expert")]
# the paper's own, of which a user may choose more than a published model has
AT_ANY_POSITION = ("scmoe", "dgmoe")
WITH_ANY_GATE = ("scmoe",)


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
    dispatcher, rows = make_dispatcher(wire, num_experts), choose_rows(capacity_factor)
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
    wiring = WIRINGS[_chosen("shortcut", shortcut, SHORTCUT_NAMES)]
    taps = POSITIONS if shortcut in AT_ANY_POSITION else [tap for tap in wiring.taps if tap]
    tap = wiring.taps[1] if position is None else _chosen("position", position, taps)
    if combine is not None:
        gates = [wiring.combine] if wiring.has_gate else []
        allowed = COEFFICIENT_GATES if shortcut in WITH_ANY_GATE else gates
        wiring = replace(wiring, combine=_chosen("combine", combine, allowed))
    schedule = Schedule(wiring.architecture, tap, expert_slot, chunks, inside_attention)

    width = 4 * dim if ffn_dim is None else ffn_dim
    parts = Parts(
        dim,
        norm=partial(nn.LayerNorm, dim),
        mlp=lambda ffn_dim=width: MLP(dim, ffn_dim),
        attention=partial(Attention, dim, heads),
        after=partial(nn.Dropout, dropout),
        experts=partial(Experts, dim, width),
    )

    def build_stream(parts: Parts) -> MoEStream:
        return MoE(
            dim,
            num_experts,
            top_k,
            ffn_dim=ffn_dim,
            capacity_factor=capacity_factor,
            router=router,
            zero_experts=zero_experts,
            group=group,
        )

    block = BLOCKS[wiring.architecture]
    return wired_block(block, wiring, schedule, [parts] * wiring.every, build_stream)


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
    world_size = wire_of(group).mesh.world_size
    # one by one, because routers and numbers of experts may differ between modules
    losses = [
        balance.load_balance_loss([of_module], sums_E2[None], world_size)
        for of_module, sums_E2 in zip(stats, _global_sums(stats, group), strict=True)
    ]
    return torch.stack(losses).mean()


def _global_sums(stats: Sequence[RouterStats], group: Any) -> list[Tensor]:
    """Return each router's integer sums, added up over the ranks of a group or wire."""
    sums = [balance.integer_sums([of_module])[0] for of_module in stats]
    mesh = wire_of(group).mesh
    if mesh.world_size > 1:
        all_sums = mesh.sum_over_ranks(torch.cat(sums))
        sums = [*all_sums.split([len(sums_E2) for sums_E2 in sums])]
    return sums


def data_parallel(module: nn.Module, group: Any) -> DistributedDataParallel:
    """Return the module in DDP over the group that shares its experts.

    After backward every gradient is that of the mean of the ranks' losses. Keep the returned module
    until backward has ended: as with any DDP module, nothing is summed without it. A
    LightningModule needs `ExpertParallelStrategy` instead, which does this too. Raises ValueError
    if the experts of the module do not belong to this rank of the group, or no dense parameter
    trains.
    """
    has_experts = any(True for _ in expert_parameters(module))
    if group is None and dist.get_world_size() > 1 and has_experts:
        raise ValueError(
            "group is None on several ranks. Give the group that shares the experts. If every rank"
            " has all experts, use DistributedDataParallel."
        )
    mesh = wire_of(group).mesh
    check_experts(module, mesh)
    wrapped = wrap(module, mesh, process_group=group)
    if not isinstance(wrapped.module, DistributedDataParallel):
        wrapped.close()
        raise ValueError("DDP averages dense parameters, but the module has none that trains.")
    return wrapped.module


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
    return Wire(Mesh(rank, size, size, ep_group=group, world_group=group))
