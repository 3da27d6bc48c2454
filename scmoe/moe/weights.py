"""How a module's weights are kept where other weights are split over ranks or are rounded. The
class says so: unlike an attribute of a tensor, it survives deepcopy, to_empty and compile.
"""

from torch import nn


class InFloat32(nn.Module):
    """Its weights stay in float32 where matrices are in bfloat16: rounded logits tie."""


class WholeOnEveryRank(nn.Module):
    """Its weights are not split over ranks: each rank moves them by the same numbers."""
