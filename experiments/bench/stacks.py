"""The rows of blocks that `bench overlap` measures, of real or of emulated operators, and their
training step.

A variant is what is measured in one turn: each block of a row runs at a schedule of its own window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from experiments.bench.emulated import EmulatedAttention, EmulatedExperts, EmulatedOperator
from experiments.bench.pairs import WIRING_OF
from experiments.bench.setting import Setting
from experiments.engine.step import Step
from scmoe.blocks.build import Parts
from scmoe.blocks.moe_block import MoEBlock, moe_blocks_of
from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.loads import BALANCED, CurrentLoad, Sizes, deal
from scmoe.models.halves import Halves
from scmoe.models.residual_stream import run_blocks
from scmoe.moe.layout import Buffers, Capacity, Dropless, Rows
from scmoe.parallel.mesh import Mesh
from scmoe.parallel.update.wrap import Wrapped, wrap
from scmoe.parallel.wire.wire import Wire
from scmoe.planning.choice import ModelChoice
from scmoe.schedule.cost import slots
from scmoe.schedule.schedule import ModelSchedule, Schedule
from scmoe.training.assembly.blocks import FAMILY_PARTS, stack


def make_blocks(name: str, setting: Setting, wire: Wire, current: CurrentLoad) -> list[MoEBlock]:
    """Return the blocks of a row as a training builds them, with this rank's share of the experts.

    name: a block's name in ROWS. current: the load, on which the times depend in place of the
    choices of an untrained gate.
    """
    config = block_config(name, setting)
    parts = emulated_parts(setting)
    if setting.compute == "real":
        parts = FAMILY_PARTS[config.model.family](config)
    blocks = moe_blocks_of(nn.ModuleList(stack(config, wire, [parts] * setting.layers)))
    assert len(blocks) == setting.moe_blocks
    sizes = Sizes(setting.num_experts, config.moe.top_k, wire.mesh.ep_size)
    for block in blocks:
        block.moe.router.deal = deal(sizes, wire.mesh.ep_rank, current)
        block.moe.arrange_as(rows_of_layout(setting))
    return blocks


def block_config(name: str, setting: Setting) -> Config:
    """Return the configuration of a row of blocks. ConfigError: they cannot have these sizes."""
    s = setting
    heads = s.heads if s.compute == "real" else 1  # emulated attention has none
    sizes = {"layers": s.layers, "dim": s.dim, "heads": heads, "ffn_dim": s.ffn_dim}
    if s.head_dim is not None:
        sizes["head_dim"] = s.head_dim
    moe = {"every": s.every, "num_experts": s.num_experts, "top_k": s.top_k_of(name)}
    words = [f"model.{key}={size}" for key, size in sizes.items()] + [
        f"moe.{key}={n}" for key, n in moe.items()
    ]
    return load_config(None, [*words, *WIRING_OF[name].overrides])


def emulated_parts(setting: Setting) -> Parts:
    """Return sub-layers and experts that sleep; all else of an MoE module is real."""
    s, mlp_ms = setting, setting.attention_ms / setting.attention_to_mlp
    weighs = s.level == "iteration"  # else no gradient travels
    return Parts(
        s.dim,
        norm=partial(nn.LayerNorm, s.dim),
        mlp=partial(EmulatedOperator, mlp_ms, weighs * 2 * s.dim * s.ffn_dim, s.tokens),
        attention=partial(EmulatedAttention, s.attention_ms, weighs * 4 * s.dim**2, s.tokens),
        after=nn.Identity,
        experts=partial(EmulatedExperts, mlp_ms * 1e3 / s.tokens),
        sublayer=lambda norm, operator, after: operator,
    )


def rows_of_layout(setting: Setting) -> Rows:
    """Return the rows of the setting's layout. ConfigError: there is no such layout."""
    kind, number = setting.kind_of_layout
    if kind == "dropless":
        return Dropless()
    return Capacity(number) if kind == "capacity" else Buffers(number)


def make_step(model: "Stack", setting: Setting, wire: Wire) -> Step:
    """Return a training step of blocks; at iteration level with the gradients' reduction and the
    optimizer's step."""
    if setting.level == "block":
        return Step(Wrapped(model, 1), Mesh())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return Step(wrap(model, wire.mesh), wire.mesh, optimizer)


class Stack(nn.Module):
    """Blocks in a row."""

    def __init__(self, blocks: Sequence[MoEBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.halves = Halves()

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.halves(partial(run_blocks, self.blocks), x_BSD, None)[0]


@dataclass(frozen=True)
class Variant:
    """Blocks with a schedule. transfers: overlapped, sequential (as Blocking does), free, or alone
    (free, and gradients stay on their ranks). load: of their experts (scmoe/loads.py).

    schedule: of the last block; the others have the same place, or as `placed` says. schedules:
    that of each block, where they do not follow from `schedule`. batches_in_flight: 2: the halves
    of a batch take turns.
    """

    block: str
    schedule: Schedule
    transfers: str = "overlapped"
    load: str = BALANCED
    schedules: tuple[Schedule, ...] = ()
    batches_in_flight: int = 1

    def block_schedules(self, schedules: Iterable[Schedule]) -> list[Schedule]:
        """Return the schedule of each block, given any schedules that they have."""
        return list(self.schedules) or [placed(each, self.schedule) for each in schedules]

    def model_schedule(self, schedule: ModelSchedule) -> ModelSchedule:
        """Return how the row's model runs, given any schedule that it has."""
        return ModelSchedule(tuple(self.block_schedules(schedule.blocks)), self.batches_in_flight)


def chosen_by(choice: ModelChoice, block: str, load: str) -> Variant:
    """Return the variant of a planner's choice for the blocks of a row."""
    schedules = [layer.schedule for layer in choice.layers]
    variant = Variant(block, schedules[-1], load=load, batches_in_flight=choice.batches)
    if variant.block_schedules(schedules) == schedules:
        return variant
    return replace(variant, schedules=tuple(schedules))


def placed(schedule: Schedule, like: Schedule) -> Schedule:
    """Return a block's own schedule at the place of another block's, in as many chunks. Where its
    window is shorter, it is the last place before, as the planner chooses it (planning/pricing.py).
    """
    places = slots(replace(schedule, chunks=like.chunks))
    latest = like.slot, like.inside_attention
    allowed = [each for each in places if (each.slot, each.inside_attention) <= latest]
    return allowed[-1] if allowed else places[0]


def between_and_inside(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Return the variants with experts between operators, and those with experts inside attention.

    A kind without variants is left out.
    """
    kinds = [
        [v for v in variants if v.schedule.inside_attention is inside] for inside in (False, True)
    ]
    return [kind for kind in kinds if kind]
