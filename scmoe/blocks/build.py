"""Builds a block of the parts of a model family and of a wiring (wirings.py): for a training, for
api.ScMoEBlock and for the benches."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.farskip import FarSkipBlock, FarSkipDenseBlock
from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import DenseBlock, SharedExpertBlock, TopKBlock
from scmoe.blocks.sublayers import Residual
from scmoe.blocks.wirings import Wiring
from scmoe.moe.coefficient import COEFFICIENT_GATES
from scmoe.moe.stream import MoEStream
from scmoe.schedule.schedule import Schedule

BLOCKS: dict[str, type[MoEBlock]] = {
    block.architecture: block
    for block in (TopKBlock, SharedExpertBlock, ShortcutBlock, FarSkipBlock, DoubleGateBlock)
}


@dataclass(frozen=True)
class Parts:
    """What the blocks of a family are made of, at one width."""

    dim: int
    norm: Callable[[], nn.Module]
    mlp: Callable[..., nn.Module]  # of Block-MLP and of the shared expert; ffn_dim: another width
    attention: Callable[[], nn.Module]
    after: Callable[[], nn.Module]  # applied to a sub-layer's output before it is added: dropout
    # Takes the number of all routed experts, and the ids that this rank holds.
    experts: Callable[[int, range], Any]
    # Takes a norm, an operator, and `after`.
    sublayer: Callable[[nn.Module, nn.Module, nn.Module], Any] = Residual

    def attention_sublayer(self) -> Any:
        return self.sublayer(self.norm(), self.attention(), self.after())

    def mlp_sublayer(self, *ffn_dim: int) -> Any:
        return self.sublayer(self.norm(), self.mlp(*ffn_dim), self.after())

    def dense_block(self, *ffn_dim: int) -> DenseBlock:
        """Return a dense block. ffn_dim: of its MLP, if it is not that of the other MLPs."""
        return DenseBlock([self.attention_sublayer(), self.mlp_sublayer(*ffn_dim)])

    def farskip_dense_block(self, ffn_dim: int) -> FarSkipDenseBlock:
        return FarSkipDenseBlock(self.attention_sublayer(), self.mlp_sublayer(ffn_dim))


def wired_block(
    block: type[MoEBlock],
    wiring: Wiring,
    schedule: Schedule,
    layers: Sequence[Parts],
    build_stream: Callable[[Parts], MoEStream],
) -> MoEBlock:
    """Return one block with an MoE.

    block: of the wiring's architecture. schedule: its position is one of the wiring's taps. layers:
    the parts of the block's layer, of the two layers of a pair, or of four layers, of which the
    last has the MoE. build_stream: of the last one.
    """
    parts = layers[-1]
    sublayers = []
    for layer in layers[:-1]:
        sublayers += [layer.attention_sublayer(), layer.mlp_sublayer()]
    sublayers.append(parts.attention_sublayer())
    norm = parts.norm()
    stream = build_stream(parts)

    tap_norm = shared_expert = coefficient = None
    if schedule.position is not None and wiring.tap_norm == "own":
        tap_norm = parts.norm()
    elif schedule.position is not None:
        after_tap = sublayers[len(sublayers) - schedule.sublayers_after_tap]
        tap_norm = after_tap.norm
    if "shared_expert" in schedule.window:
        shared_expert = parts.mlp()
    if wiring.has_gate:
        coefficient = COEFFICIENT_GATES[wiring.combine](parts.dim)
    after = parts.after()
    if wiring.after_norm:
        after = nn.Sequential(OrderedDict(norm=parts.norm(), after=after))
    return block(
        sublayers,
        norm,
        stream,
        schedule,
        after,
        tap_norm=tap_norm,
        shared_expert=shared_expert,
        coefficient=coefficient,
        coefficient_reads_tap=wiring.coefficient_input == "tap",
        distinct_experts=wiring.distinct_experts,
    )
