"""Which part of each parameter a rank holds, and what it gathers and sums, for each way of keeping dense weights.

    replicated    dense weights whole on every rank; experts whole on the ranks that hold the same ones (edp)
    sharded       dense weights over all ranks, experts over edp, each block gathered as one unit (FSDP2)
    hybrid        dense weights over the ranks of a node, with a copy on each node; experts over edp

Dense weights are split on dim 0, of which each rank but the last has the same number of rows, rounded up; what is
gathered has as many rows on every rank. Experts are split on dim 1, evenly. Under bf16-mixed, matrices are gathered in
bfloat16, but routers and vectors in float32, and all gradients are summed in float32.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from scmoe.footprint.model_cost import WEIGHT_BYTES
from scmoe.models.units import exact_parameters, units
from scmoe.moe.experts import Experts


@dataclass(frozen=True)
class Split:
    """model: the whole model. ep_size ranks share one set of experts, dp_size ranks hold the same ones, node_size
    ranks are on a node."""

    model: Any
    dense: str
    ep_size: int
    dp_size: int
    node_size: int
    precision: str

    @cached_property
    def experts(self) -> set[nn.Parameter]:
        return {p for m in self.model.modules() if isinstance(m, Experts) for p in m.parameters()}

    @cached_property
    def exact(self) -> set[nn.Parameter]:
        """The parameters that stay in float32 when the others are gathered in bfloat16."""
        return exact_parameters(self.model)

    @cached_property
    def gathered_twice(self) -> set[nn.Parameter]:
        """The parameters that are gathered for forward and again for backward: all but those outside blocks and those
        of the last unit, with which backward begins."""
        return {p for unit in units(self.model)[:-1] for block in unit for p in block.parameters()}

    @cached_property
    def outside(self) -> list[nn.Parameter]:
        """The parameters outside blocks."""
        inside = {p for unit in units(self.model) for block in unit for p in block.parameters()}
        return [p for p in self.model.parameters() if p not in inside]

    @property
    def width(self) -> int:
        """Bytes of a number of a weight."""
        return WEIGHT_BYTES[self.precision]

    def shards(self, p: nn.Parameter) -> int:
        """Number of ranks over which a parameter is split, beside the split of experts over EP."""
        if self.dense == "replicated":
            return 1
        if p in self.experts:
            return self.dp_size
        return self.node_size if self.dense == "hybrid" else self.ep_size * self.dp_size

    def held(self, p: nn.Parameter) -> int:
        """Numbers of a parameter on rank 0."""
        if p in self.experts:
            return p.numel() // self.ep_size // self.shards(p)
        return math.ceil(p.shape[0] / self.shards(p)) * (p.numel() // p.shape[0])

    def gathered(self, p: nn.Parameter) -> int:
        """Numbers of a parameter while it is whole, padding included."""
        return self.held(p) * self.shards(p)

    def gathered_bytes(self, p: nn.Parameter) -> int:
        narrow = self.precision == "bf16-mixed" and p not in self.exact
        return self.gathered(p) * (2 if narrow else self.width)

    def summed_bytes(self, p: nn.Parameter) -> int:
        """Bytes of a gradient in the sum over ranks."""
        return self.gathered(p) * (4 if self.precision.startswith("bf16") else self.width)

    def gathered_block(self, block: nn.Module) -> int:
        """Bytes of a block's weights while they are whole."""
        return sum(map(self.gathered_bytes, block.parameters()))
