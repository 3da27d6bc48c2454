"""The pairs of blocks that `bench overlap` measures: every architecture, of real or of emulated operators."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import SharedExpertBlock, TopKBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.config.leaves import ConfigError
from scmoe.experiments.bench.emulated import EmulatedExperts, EmulatedOperator
from scmoe.experiments.engine.step import Step
from scmoe.moe.coefficient import CG1
from scmoe.moe.experts import Experts
from scmoe.moe.layout import rows_of
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.update.wrap import Wrapped, wrap
from scmoe.parallel.wire.all_to_all import Link
from scmoe.parallel.wire.all_to_all_dispatcher import AllToAllDispatcher
from scmoe.schedule.schedule import POSITIONS, Schedule

CHUNKS = {"": (1,), "_pipelined": (2, 4)}  # numbers of chunks to choose from
USUAL_ROWS = {  # row: (block, numbers of chunks); top2, top2_pipelined, ..., scmoe_pos1, ..., scmoe_pos1_pipelined, ...
    **{name + way: (name, CHUNKS[way]) for name in ("top2", "top1", "shared_expert") for way in CHUNKS},
    **{f"scmoe_{position}{way}": (position, CHUNKS[way]) for way in CHUNKS for position in POSITIONS},
}
# Table 4 has two more, which are measured where they are asked for: scmoe2 routes each token to two experts, at Pos-2
ROWS = USUAL_ROWS | {name: (name, CHUNKS[""]) for name in ("top3", "scmoe2")}
TOP_K = {"top2": 2, "top3": 3, "scmoe2": 2}  # routed experts of a token; 1 in all other blocks


@dataclass(frozen=True)
class Setting:
    """share: share of communication, reached by a search for the links' rate; link_mbit: the rate itself, without a
    search. tokens: tokens of one rank, in sequences of seq_len. attention_ms, attention_to_mlp: time of an attention,
    and its ratio to an MLP's; for emulated compute only. shaped: whether the links have a rate at all. bus: rows go
    over the device's bus instead of links (emulated.over_the_bus), and the share is reached by its rate. reductions: of
    the gradients, as the Strategy's. nodes: the rate is that of their network cards; with 1, of every rank's link.
    exchange: flat | hierarchical | auto."""

    share: float
    link_mbit: float | None = None
    compute: str = "emulated"
    level: str = "block"
    rounds: int = 9
    dim: int = 512
    ffn_dim: int = 2048
    heads: int = 8
    tokens: int = 1024
    seq_len: int = 256
    num_experts: int = 8
    attention_ms: float = 45.0
    attention_to_mlp: float = 3.0
    shaped: bool = True
    device: str = "cpu"
    dtype: str = "float32"
    bus: bool = False
    reductions: str = "paced"
    nodes: int = 1
    exchange: str = "flat"
    rows: tuple[str, ...] = tuple(USUAL_ROWS)

    @property
    def pairs(self) -> int:
        """Pairs in a row."""
        return 2 if self.level == "iteration" else 1


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


def make_block(name: str, setting: Setting, group: Any, capacity_factor: float | None = 1.0) -> MoEBlock:
    """A pair with this rank's share of the experts. name: a block's name in ROWS. capacity_factor: None: dropless."""
    s, schedule, emulated = setting, default_schedule(name), setting.compute == "emulated"
    mlp_ms = s.attention_ms / s.attention_to_mlp

    weighs = s.level == "iteration"  # else no gradient travels

    def attention() -> nn.Module:
        return EmulatedOperator(s.attention_ms, weighs * 4 * s.dim**2) if emulated else Attention(s.dim, s.heads)

    def mlp() -> nn.Module:
        return EmulatedOperator(mlp_ms, weighs * 2 * s.dim * s.ffn_dim) if emulated else MLP(s.dim, s.ffn_dim)

    sublayers = [attention(), mlp(), attention()]
    if not emulated:
        sublayers = [Residual(nn.LayerNorm(s.dim), part) for part in sublayers]
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    own = range(rank * s.num_experts // ranks, (rank + 1) * s.num_experts // ranks)
    us_per_row = mlp_ms * 1e3 / s.tokens
    if emulated:
        experts: Any = EmulatedExperts(us_per_row, s.num_experts, own)
    else:
        experts = Experts(s.dim, s.ffn_dim, s.num_experts, own)
    # every expert gets its fair share, so that the time does not depend on the choices of an untrained gate
    router = Router(s.dim, s.num_experts, TOP_K.get(name, 1), balanced=True)
    stream = MoEStream(router, experts, AllToAllDispatcher(group, s.num_experts), rows_of(capacity_factor))
    if name in ("top1", "top2", "top3"):
        return TopKBlock(sublayers, nn.LayerNorm(s.dim), stream, schedule)
    norms = [nn.LayerNorm(s.dim) for _ in range(2)]
    parts: dict[str, Any] = {"shared_expert": mlp(), "coefficient": CG1(s.dim)}
    if name == "shared_expert":
        return SharedExpertBlock(sublayers, norms[0], stream, schedule, **parts)
    return ShortcutBlock(sublayers, norms[1], stream, schedule, tap_norm=norms[0], **parts)


def make_step(stack: Sequence[nn.Module], setting: Setting, group: Any, link: Link) -> Step:
    """Return a training step of blocks; at iteration level with the gradients' reduction and the optimizer's step.

    group: of the experts. link: the rows'.
    """
    model = Stack(*stack)
    ranks = dist.get_world_size(group)
    if setting.level == "block":
        return Step(Wrapped(model, 1), ParallelContext())
    context = ParallelContext(
        dist.get_rank(group), ranks, ranks, ep_group=group, gradient_group=dist.new_group(), link=link
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return Step(wrap(model, context, setting.reductions), context, optimizer)


class Stack(nn.Sequential):
    """Blocks in a row."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        for block in self:
            x_BSD = block(x_BSD).y_BSD
        return x_BSD
