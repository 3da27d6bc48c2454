"""The pairs of blocks that `bench overlap` measures, of real or of emulated operators, and their training step."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import SharedExpertBlock, TopKBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.config.leaves import ConfigError
from scmoe.experiments.bench.emulated import EmulatedAttention, EmulatedExperts, EmulatedOperator
from scmoe.experiments.bench.loads import Now, Place, deal
from scmoe.experiments.bench.pairs import TOP_K, Setting, default_schedule
from scmoe.experiments.engine.step import Step
from scmoe.moe.coefficient import CG1
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Buffers, Capacity, Dropless, Rows
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import ParallelContext
from scmoe.parallel.update.wrap import Wrapped, wrap
from scmoe.parallel.wire.all_to_all import Link
from scmoe.parallel.wire.all_to_all_dispatcher import AllToAllDispatcher


def make_block(name: str, setting: Setting, group: Any, now: Now) -> MoEBlock:
    """A pair with this rank's share of the experts. name: a block's name in ROWS. now: the load, which the times depend
    on in place of the choices of an untrained gate."""
    s, schedule, emulated = setting, default_schedule(name), setting.compute == "emulated"
    mlp_ms = s.attention_ms / s.attention_to_mlp

    weighs = s.level == "iteration"  # else no gradient travels

    def attention() -> nn.Module:
        weights = weighs * 4 * s.dim**2
        return EmulatedAttention(s.attention_ms, weights, s.tokens) if emulated else Attention(s.dim, s.heads)

    def mlp() -> nn.Module:
        weights = weighs * 2 * s.dim * s.ffn_dim
        return EmulatedOperator(mlp_ms, weights, s.tokens) if emulated else MLP(s.dim, s.ffn_dim)

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
    top_k = TOP_K.get(name, 1)
    router = Router(s.dim, s.num_experts, top_k, deal=deal(Place(s.num_experts, top_k, ranks), rank, now))
    stream = MoEStream(router, experts, AllToAllDispatcher(group, s.num_experts), rows_of_layout(s))
    if name in ("top1", "top2", "top3"):
        return TopKBlock(sublayers, nn.LayerNorm(s.dim), stream, schedule)
    norms = [nn.LayerNorm(s.dim) for _ in range(2)]
    parts: dict[str, Any] = {"shared_expert": mlp(), "coefficient": CG1(s.dim)}
    if name == "shared_expert":
        return SharedExpertBlock(sublayers, norms[0], stream, schedule, **parts)
    return ShortcutBlock(sublayers, norms[1], stream, schedule, tap_norm=norms[0], **parts)


def rows_of_layout(setting: Setting) -> Rows:
    """Raises ConfigError for a layout that does not exist."""
    kind, _, number = (setting.layout or ("dropless" if setting.loads else "capacity:1")).partition(":")
    try:
        if kind == "dropless" and not number:
            return Dropless()
        if kind in ("capacity", "buffers") and 0 < float(number) <= 1e6:
            return Capacity(float(number)) if kind == "capacity" else Buffers(float(number))
    except ValueError:
        pass
    raise ConfigError(f"--layout is {setting.layout}, allowed: dropless | capacity:F | buffers:C, 0 < F, C <= 1e6")


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
