"""Swin Transformer V2 (Liu et al. 2022) over any stack of blocks: four stages, between which 2 x 2 patches are merged.

Feature maps are [B, H, W, D]; a token is a place of the map, D doubles from stage to stage and H, W halve. SwinV2
normalises after each sub-layer, x + drop_path(norm(f(x))), so its blocks are built of parts without a norm before, and
with `PostNorm` after (docs/decisions/0014-post-norm.md). Attention, patch embedding and merging are timm's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, PatchEmbed
from timm.models.swin_transformer_v2 import PatchMerging, SwinTransformerV2Block, window_partition, window_reverse
from torch import Tensor, nn

from scmoe.moe.experts import Experts, named_generator
from scmoe.tokens import RouterStats

STD = 0.02  # of all products, as in timm


class ClassifierOutput(NamedTuple):
    logits_BC: Tensor
    stats: list[RouterStats]  # one per MoE layer


class ShiftedWindows(nn.Module):
    """Self-attention within windows of the map, which every second block shifts by half a window.

    grid: height and width of the map. A window that is not smaller than the map is the map, and nothing is shifted.
    """

    def __init__(self, dim: int, heads: int, grid: int, window: int, shifted: bool) -> None:
        super().__init__()
        block: Any = SwinTransformerV2Block(dim, grid, heads, window, window // 2 if shifted else 0)
        self.attention, self.window, self.shift = block.attn, block.window_size, block.shift_size
        self.register_buffer("mask", block.attn_mask, persistent=False)  # no attention across the map's border

    def forward(self, x_BHWD: Tensor) -> Tensor:
        up, left = self.shift
        x_BHWD = x_BHWD.roll((-up, -left), (1, 2))
        windows_NSD = window_partition(x_BHWD, self.window).flatten(1, 2)
        y_NSD = self.attention(windows_NSD, self.mask)
        y_BHWD = window_reverse(y_NSD.unflatten(1, self.window), self.window, x_BHWD.shape[1:3])
        return y_BHWD.roll((up, left), (1, 2))


class PostNorm(nn.Module):
    """drop_path(norm(y)): what SwinV2 does to a sub-layer's output before it is added."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm, self.drop_path = nn.LayerNorm(dim), DropPath(drop_path)

    def forward(self, y_BHWD: Tensor) -> Tensor:
        return self.drop_path(self.norm(y_BHWD))


class Swin(nn.Module):
    """stages: the blocks of each, called as block(x_BHWD, mask_BHW), each gives an MoEOutput. dim: of the first."""

    stages: Any  # a list of lists of modules

    def __init__(
        self, image_size: int, patch_size: int, dim: int, num_classes: int, stages: Sequence[Sequence[nn.Module]]
    ) -> None:
        super().__init__()
        self.patches = PatchEmbed(image_size, patch_size, 3, dim, norm_layer=nn.LayerNorm, output_fmt="NHWC")
        widths = [dim * 2**i for i in range(len(stages))]
        self.merges = nn.ModuleList([nn.Identity(), *(PatchMerging(width) for width in widths[:-1])])
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage]

    def forward(self, images_BCHW: Tensor, mask_B: Tensor | None = None) -> ClassifierOutput:
        """mask_B False: a filler picture, which is routed nowhere."""
        x_BHWD = self.patches(images_BCHW)
        stats = []
        for merge, stage in zip(self.merges, self.stages, strict=True):
            x_BHWD = merge(x_BHWD)
            mask_BHW = None if mask_B is None else mask_B[:, None, None].expand(x_BHWD.shape[:3])
            for block in stage:
                x_BHWD, layer_stats = block(x_BHWD, mask_BHW)
                if layer_stats is not None:
                    stats.append(layer_stats)
        return ClassifierOutput(self.head(self.norm(x_BHWD).mean((1, 2))), stats)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """timm's: products N(0, 0.02), patches as a convolution's; a block begins as the identity, its norms being 0.

        The result depends on the seed, names and shapes alone, not on the rank, the EP degree or earlier draws.
        """
        for name, module in self.named_modules():
            if isinstance(module, Experts):
                module.init_weights(f"{seed}/{name}", STD, STD)
            elif isinstance(module, nn.Linear):
                module.weight.copy_(torch.randn(module.weight.shape, generator=named_generator(f"{seed}/{name}")) * STD)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Conv2d):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for kind, weight in module.named_parameters():
                    generator = named_generator(f"{seed}/{name}/{kind}")
                    weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)
            elif isinstance(module, PostNorm):
                module.norm.weight.zero_()

    def no_weight_decay(self) -> set[nn.Parameter]:
        """What timm keeps from decaying, beside norms and biases: the attention's scales and position bias."""
        return {p for name, p in self.named_parameters() if "cpb_mlp" in name or "logit_scale" in name}
