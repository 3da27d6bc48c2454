"""Swin Transformer V2 (Liu et al. 2022) over any stack of blocks.

It has four stages, between which 2 x 2 patches are merged.

Feature maps are [B, H, W, D]; a token is a place of the map, D doubles from stage to stage and H, W
halve. SwinV2 normalises after each sub-layer, x + drop_path(norm(f(x))), so its blocks have parts
without a norm before and with `PostNorm` after (docs/decisions/0014-post-norm.md). Attention, patch
embedding and merging are timm's.
"""

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, PatchEmbed
from timm.models.swin_transformer_v2 import (
    PatchMerging,
    SwinTransformerV2Block,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from scmoe.blocks.sublayers import SelfAttention
from scmoe.models.halves import Halves
from scmoe.models.residual_stream import run_blocks, widen_under_autocast
from scmoe.moe.experts import Experts, named_generator
from scmoe.moe.router import SelectionBias
from scmoe.moe.tokens import RouterStats

STD = 0.02  # of all products, as in timm


class ClassifierOutput(NamedTuple):
    logits_BC: Tensor
    stats: list[RouterStats]  # one per MoE layer


class ShiftedWindows(SelfAttention):
    """Self-attention within windows of the map, which every second block shifts by half a window.

    grid: height and width of the map. If the window is not smaller than the map, it is the map and
    is not shifted.
    """

    mask: Tensor | None  # no attention across the map's border

    def __init__(self, dim: int, heads: int, grid: int, window: int, shifted: bool) -> None:
        super().__init__()
        block: Any = SwinTransformerV2Block(dim, grid, heads, window, window // 2 if shifted else 0)
        self.attention = block.attn
        self.window = block.window_size
        self.shift = block.shift_size
        self.register_buffer("mask", block.attn_mask, persistent=False)
        self.dim = dim
        self.heads = heads
        self.grid = grid

    def reset_parameters(self) -> None:
        """Set what is not drawn: scales, biases, and the buffers (tables, mask).

        The buffers move to the weights' device.
        """
        device = self.attention.proj.weight.device
        for module in (self, self.attention):
            for name, buffer in [*module.named_buffers(recurse=False)]:
                setattr(module, name, torch.empty_like(buffer, device=device))
        self.attention.reset_parameters()
        if self.mask is None:
            return

        # the shift joins what is apart on the map
        row_H = torch.arange(self.grid, device=self.mask.device)
        is_in_last_window_H = row_H >= self.grid - self.window[0]
        is_shifted_in_H = row_H >= self.grid - self.shift[0]
        part_H = is_in_last_window_H.int() + is_shifted_in_H.int()
        part_BHWD = (3 * part_H[:, None] + part_H)[None, :, :, None]
        part_NS = window_partition(part_BHWD, self.window).flatten(1)
        is_apart_NSS = part_NS[:, None] != part_NS[:, :, None]
        self.mask.zero_().masked_fill_(is_apart_NSS, -100.0)  # as in timm

    def forward(self, x_BHWD: Tensor) -> Tensor:
        if not len(x_BHWD):  # the second half of a batch of one image; timm refuses it
            return x_BHWD
        up, left = self.shift
        x_BHWD = x_BHWD.roll((-up, -left), (1, 2))
        windows_NSD = window_partition(x_BHWD, self.window).flatten(1, 2)
        y_NSD = self.attention(windows_NSD, self.mask)
        y_BHWD = window_reverse(y_NSD.unflatten(1, self.window), self.window, x_BHWD.shape[1:3])
        return y_BHWD.roll((up, left), (1, 2))

    def context(self, seq_len: int) -> int:
        return math.prod(self.window)


class PostNorm(nn.Module):
    """drop_path(norm(y)): SwinV2 applies it to a sub-layer's output before it is added."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm, self.drop_path = nn.LayerNorm(dim), DropPath(drop_path)

    def forward(self, y_BHWD: Tensor) -> Tensor:
        return self.drop_path(self.norm(y_BHWD))


class Swin(nn.Module):
    """The network: patches, stages with merges between them, norm, head.

    stages: the blocks of each; a block is called as block(x_BHWD, mask_BHW) and returns an
    MoEOutput. dim: width of the first stage.
    """

    stages: Any  # a list of lists of modules

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        num_classes: int,
        stages: Sequence[Sequence[nn.Module]],
    ) -> None:
        super().__init__()
        self.patches = PatchEmbed(
            image_size, patch_size, 3, dim, norm_layer=nn.LayerNorm, output_fmt="NHWC"
        )
        widths = [dim * 2**i for i in range(len(stages))]
        self.merges = nn.ModuleList(
            [nn.Identity(), *(PatchMerging(width) for width in widths[:-1])]
        )
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages)
        self.halves = Halves()
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage]

    @property
    def steps(self) -> list[nn.Module]:
        """Merges and blocks in the order of forward."""
        return [
            step
            for merge, stage in zip(self.merges, self.stages, strict=True)
            for step in (merge, *stage)
        ][1:]

    def forward(self, images_BCHW: Tensor, mask_B: Tensor | None = None) -> ClassifierOutput:
        """Return the logits of each class. mask_B False: a filler picture, which is routed
        nowhere."""
        x_BHWD, all_stats = self.halves(self.through_stages, self.patches(images_BCHW), mask_B)
        return ClassifierOutput(self.head(self.norm(x_BHWD).mean((1, 2))), all_stats)

    def through_stages(
        self, x_BHWD: Tensor, mask_B: Tensor | None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Return the last stage's map, and the routers' sums of all stages."""
        all_stats: list[RouterStats] = []
        for merge, stage in zip(self.merges, self.stages, strict=True):
            x_BHWD = widen_under_autocast(merge(x_BHWD))
            mask_BHW = None if mask_B is None else mask_B[:, None, None].expand(x_BHWD.shape[:3])
            x_BHWD, stats = run_blocks(stage, x_BHWD, mask_BHW)
            all_stats += stats
        return x_BHWD, all_stats

    @torch.no_grad()
    def init_weights(self, seed: int, put: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """Draw all weights as timm does: products N(0, 0.02), patches as a convolution's.

        A block starts as the identity: its norms are 0. The result depends only on the seed, names
        and shapes: not on the rank, the EP degree or earlier draws. Buffers are computed again.
        put: copies a value into a weight, or into the part of a weight that this rank holds.
        """
        for name, module in self.named_modules():
            if isinstance(module, Experts):
                module.init_weights(f"{seed}/{name}", STD, STD, put)
            elif isinstance(module, (ShiftedWindows, nn.LayerNorm, SelectionBias)):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                generator = named_generator(f"{seed}/{name}")
                drawn = torch.randn(module.weight.shape, generator=generator, device="cpu")
                put(module.weight, drawn * STD)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Conv2d):
                bound = 1 / math.sqrt(module.weight.shape[1:].numel())
                for kind, weight in module.named_parameters():
                    generator = named_generator(f"{seed}/{name}/{kind}")
                    drawn = torch.rand(weight.shape, generator=generator, device="cpu")
                    put(weight, (2 * drawn - 1) * bound)
        for norm in [module.norm for module in self.modules() if isinstance(module, PostNorm)]:
            norm.weight.zero_()

    def rows_per_sample(self, seq_len: int) -> dict[nn.Module, float]:
        """Return the rows that each module sees of one sample: the places of the map at its stage.

        seq_len: not read.
        """
        rows = dict.fromkeys(self.head.modules(), 1.0)
        places = float(self.patches.num_patches)
        rows |= dict.fromkeys(self.patches.modules(), places)
        for merge, stage in zip(self.merges, self.stages, strict=True):
            places /= 1 if isinstance(merge, nn.Identity) else 4
            rows |= dict.fromkeys(chain(merge.modules(), stage.modules()), places)
        rows |= dict.fromkeys(self.norm.modules(), places)
        windows = (module for module in self.modules() if isinstance(module, ShiftedWindows))
        # once a batch
        position_biases = chain.from_iterable(w.attention.cpb_mlp.modules() for w in windows)
        return rows | dict.fromkeys(position_biases, 0.0)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm does not decay, apart from norms and biases.

        They are attention scales and position bias. timm's create_optimizer_v2 asks for them too.
        """
        return {
            name
            for name, _ in self.named_parameters()
            if "cpb_mlp" in name or "logit_scale" in name
        }
