"""Fig. 10, 14, 15: cosine similarity of all intermediate representations of a model.

A representation is a value of the residual stream: the input, and the stream after each attention, MLP or MoE module.
An entry of the matrix is the mean over tokens of the cosine of two representations. If their widths differ, as between
the stages of SwinV2, the entry is NaN.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.sublayers import MLP
from scmoe.probes.charts import SMALL, chart, heading

NUMBERED = 12  # a panel with up to so many representations has its entries written into it


@torch.no_grad()
def cosine_matrix(representations: Sequence[Tensor]) -> Tensor:
    """[N, N] float64 of N representations [T, D] of the same T tokens; NaN where D differs."""
    matrix = torch.full((len(representations),) * 2, torch.nan, dtype=torch.float64)
    start = 0
    for _, group in groupby(representations, lambda x: x.shape[-1]):
        unit_NTD = torch.stack([F.normalize(x.double(), dim=-1) for x in group])
        size, (_, num_tokens, _) = len(unit_NTD), unit_NTD.shape
        flat_ND = unit_NTD.flatten(1)
        matrix[start : start + size, start : start + size] = (flat_ND @ flat_ND.T / num_tokens).cpu()
        start += size
    return matrix


class SimilarityProbe:
    """Keeps some tokens of every representation of one forward pass, by hooks; call `remove` afterwards.

    max_tokens: number of tokens that are kept of the batch, evenly spaced.
    """

    def __init__(self, model: Any, max_tokens: int = 256) -> None:
        self.max_tokens = max_tokens
        self.kept: list[tuple[str, Tensor]] = []
        self.handles: list[RemovableHandle] = []
        layer = 0
        for block in model.blocks:
            self.handles.append(block.register_forward_pre_hook(self._keep_input))
            for sublayer in block.sublayers:
                is_mlp = isinstance(sublayer.f, MLP)
                name = f"{layer} {'MLP' if is_mlp else 'attention'}"
                self.handles.append(sublayer.register_forward_hook(partial(self._keep, name)))
                layer += is_mlp
            if isinstance(block, MoEBlock):
                self.handles.append(block.register_forward_hook(partial(self._keep, f"{layer} MoE")))
                layer += 1

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keeps the first block's input, and every input of a new width; others are the output of the block before."""
        if not self.kept or self.kept[-1][1].shape[-1] != args[0].shape[-1]:
            self._keep("input", module, args, args[0])

    def _keep(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """output: of a sub-layer, or of a block, which returns an MoEOutput."""
        x_TD = (output if isinstance(output, Tensor) else output.y_BSD).detach().flatten(0, -2)
        step = -(-len(x_TD) // self.max_tokens)
        self.kept.append((name, x_TD[::step].clone()))

    def result(self) -> Tensor:
        """[N, N + 1]: this rank's matrix, and a column of ones that counts ranks when results are added up."""
        matrix = cosine_matrix([x for _, x in self.kept])
        return torch.cat([matrix, torch.ones(len(matrix), 1, dtype=torch.float64)], dim=1).to(self.kept[0][1].device)

    def labels(self) -> list[str]:
        return [name for name, _ in self.kept]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def similarity_metrics(matrix: Any) -> dict[str, float]:
    """The mean similarity of neighbours: representations with one sub-layer between them."""
    neighbours = torch.as_tensor(matrix).diagonal(1)
    return {"similarity/neighbours": float(neighbours.nanmean())}


def draw_similarity(steps: Sequence[int], labels: Sequence[str], values: Any, path: Path, words: str = "") -> None:
    """Draws the last matrix, one panel below the other for each width. values: [steps, N, N].

    The colour scale starts at the lowest value: neighbours are near 1, and would look the same on a scale from 0.
    """
    starts = [i for i, label in enumerate(labels) if label == "input"] + [len(labels)]
    groups = [slice(a, b) for a, b in pairwise(starts)]
    matrix = values[-1]
    sides = [min(4.4, max(1.6, 0.42 * (group.stop - group.start))) for group in groups]  # inches
    lowest = math.floor(20 * min(0.95, float(torch.as_tensor(matrix).nan_to_num(1.0).min()))) / 20
    with chart(path, 0.4 + sum(sides) + len(sides)) as figure:
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=sides)[:, 0]
        for axis, group, side in zip(axes, groups, sides, strict=True):
            size = group.stop - group.start
            image = axis.imshow(matrix[group, group], vmin=lowest, vmax=1, cmap="magma")
            places = range(0, size, math.ceil(0.14 * size / side))  # a name is 0.14 inches high
            names = [labels[group][i] for i in places]
            axis.set_xticks(places, names, rotation=90, fontsize=SMALL)
            axis.set_yticks(places, names, fontsize=SMALL)
            axis.spines[:].set_visible(False)
            if size <= NUMBERED:
                for (i, j), value in np.ndenumerate(matrix[group, group]):
                    color = "w" if value < (1 + lowest) / 2 else "k"
                    text = f"{value:.2f}".replace("0.", ".")
                    axis.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=color)
        step = f"cosine similarity after {steps[-1]:,} steps"
        heading(figure, f"{words}\n{step}" if words else step)
        figure.colorbar(image, ax=list(axes), shrink=min(1.0, 3.0 / sum(sides)), anchor=(0.0, 1.0))
