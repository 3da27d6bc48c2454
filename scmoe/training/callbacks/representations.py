"""How similar representations are: the two inputs of a gate (Fig. 9), and all of a model (Fig. 10,
14, 15). How large the loss's gradient is at each of them (Eq. 22).

Fig. 9 compares the current and the preceding layer's representations at one gate:

    a  share of tokens whose likeliest expert is the same for both            repeated_selection
    b  L2 distance of the two, as the gate reads them                         l2_distance
    c  mean probability of the expert that the current one goes to            score_current
    d  mean probability of the expert that the preceding one goes to          score_preceding

Noise on the logits is left out. In DGMoE, where both would choose one expert, the current
representation goes to its second best, and (c) is the probability of that one; with
moe.distinct_experts=false it stays that of the best. In blocks without a
tap, the preceding representation is read at a position that the caller chooses, through the block's
only norm.

Fig. 10, cosine similarity. A representation is a value of the residual stream: the input, and the
stream after each attention, MLP or MoE module. An entry of the matrix is the mean over tokens of
the cosine of two representations. If their widths differ, as between the stages of SwinV2, the
entry is NaN.

Eq. 22: dE/dx_l = dE/dx_L (1 + d/dx_l sum_i F_i(x_i)). The 1 is the residual stream, which hands the
last representation's gradient to all earlier ones, however many sub-layers lie between.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.sublayers import MLP
from scmoe.moe.router import Router
from scmoe.schedule.schedule import POSITIONS

GATING_TITLES = {
    "repeated_selection": "(a) repeated selection",
    "l2_distance": "(b) L2 distance",
    "score_current": "(c) gating score, current",
    "score_preceding": "(d) gating score, preceding",
}


@torch.no_grad()
def gating_sums(
    current_TD: Tensor, preceding_TD: Tensor, router: Router, distinct: bool = False
) -> Tensor:
    """Return [5] float64: the four quantities summed over tokens, then the number of tokens. They
    can be added up over ranks.

    distinct: follow DGMoE's rule, by which the current representation does not go to the expert of
    the preceding one.
    """
    wide = torch.promote_types(current_TD.dtype, torch.float32)
    with torch.autocast(current_TD.device.type, enabled=False):
        current_TD, preceding_TD = current_TD.to(wide), preceding_TD.to(wide)
        best_T2, scores_T2 = best_two(router, current_TD)
        before_T2, scores_before_T2 = best_two(router, preceding_TD)
        repeated_T = best_T2[:, 0] == before_T2[:, 0]
        score_T = (
            scores_T2[:, 1].where(repeated_T, scores_T2[:, 0]) if distinct else scores_T2[:, 0]
        )
        distance_T = (current_TD - preceding_TD).norm(dim=-1)
    columns = repeated_T, distance_T, score_T, scores_before_T2[:, 0], torch.ones_like(distance_T)
    return torch.stack([column.double().sum() for column in columns])


def best_two(router: Router, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two experts [T, 2] that the gate prefers for each token, and their scores."""
    logits_TE = router.without_noise(x_TD)
    scores_TE = router.scoring.score(logits_TE)
    ids_T2 = router.preference(logits_TE, scores_TE).topk(2).indices
    return ids_T2, scores_TE.gather(-1, ids_T2)


def means(sums: Tensor) -> Tensor:
    """Return the means of a probe's sums. sums: rows, each with its count in the last column."""
    return sums[:, :-1] / sums[:, -1:]


class GatingProbe:
    """Reads every MoE block of a model by hooks in one forward pass. Call `remove` after the pass.

    position: where the preceding representation is read in blocks without a tap, which must have
    enough sub-layers.
    """

    def __init__(self, model: Any, position: str = "pos2") -> None:
        self.position = position
        self.sums: list[Tensor] = []
        self.handles: list[RemovableHandle] = []
        for block in model.blocks:
            if isinstance(block, MoEBlock):
                self._watch(block)

    def _watch(self, block: MoEBlock) -> None:
        tap_norm = block.tap_norm
        reads_tap: nn.Module | None = tap_norm
        if reads_tap is None or tap_norm is None:
            reads_tap = block.sublayers[-POSITIONS[self.position]]
            tap_norm = block.norm
        seen: dict[str, Tensor] = {}

        def note(name: str) -> Any:
            return lambda module, args: seen.update({name: args[0].detach()})

        def compare(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # `forward` does not call this probe's own hooks.
            current = block.norm.forward(seen.pop("current"))
            preceding = tap_norm.forward(seen.pop("preceding"))
            mask = args[1] if len(args) > 1 else None
            if mask is None:
                mask = torch.ones_like(current[..., 0], dtype=torch.bool)
            distinct = isinstance(block, DoubleGateBlock) and block.distinct_experts
            sums = gating_sums(current[mask], preceding[mask], block.moe.router, distinct)
            self.sums.append(sums)

        self.handles += [
            reads_tap.register_forward_pre_hook(note("preceding")),
            block.norm.register_forward_pre_hook(note("current")),
            # It runs before FSDP splits the weights again.
            block.register_forward_hook(compare, prepend=True),
        ]

    def result(self) -> Tensor:
        """Return the sums [L, 5] over this rank's tokens."""
        return torch.stack(self.sums)

    def labels(self) -> list[str]:
        return [f"MoE layer {i}" for i in range(len(self.sums))]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def gating_metrics(means_L4: Any) -> dict[str, float]:
    """Return the mean of each quantity over layers."""
    return {
        f"gating/{name}": float(value)
        for name, value in zip(GATING_TITLES, means_L4.mean(0), strict=True)
    }


@torch.no_grad()
def cosine_matrix(representations: Sequence[Tensor]) -> Tensor:
    """Return the float64 matrix [N, N] of N representations [T, D] of the same T tokens; it has NaN
    where D differs."""
    matrix = torch.full((len(representations),) * 2, torch.nan, dtype=torch.float64)
    start = 0
    for _, group in groupby(representations, lambda x: x.shape[-1]):
        unit_NTD = torch.stack([F.normalize(x.double(), dim=-1) for x in group])
        size, num_tokens, _ = unit_NTD.shape
        flat_ND = unit_NTD.flatten(1)
        matrix[start : start + size, start : start + size] = (
            flat_ND @ flat_ND.T / num_tokens
        ).cpu()
        start += size
    return matrix


def watch_representations(model: Any, keep: Callable[[str, Tensor], None]) -> list[RemovableHandle]:
    """Call keep(name, x) for every representation of a forward pass, in order, and return the
    hooks that do so.

    Kept are the first block's input, every input of a new width, and the output of every sub-layer
    and MoE module. Other inputs are the output of the preceding block.
    """
    handles: list[RemovableHandle] = []
    width = layer = 0

    def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal width
        if args[0].shape[-1] != width:
            width = args[0].shape[-1]
            keep("input", args[0])

    def keep_output(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(name, output if isinstance(output, Tensor) else output.y_BSD)

    for block in model.blocks:
        handles.append(block.register_forward_pre_hook(keep_input))
        for sublayer in block.sublayers:
            is_mlp = isinstance(sublayer.f, MLP)
            name = f"{layer} {'MLP' if is_mlp else 'attention'}"
            handles.append(sublayer.register_forward_hook(partial(keep_output, name)))
            layer += is_mlp
        if isinstance(block, MoEBlock):
            handles.append(block.register_forward_hook(partial(keep_output, f"{layer} MoE")))
            layer += 1
    return handles


class SimilarityProbe:
    """Keeps some tokens of every representation of one forward pass, by hooks. Call `remove` after
    the pass.

    max_tokens: the number of tokens that are kept of the batch, evenly spaced.
    """

    def __init__(self, model: Any, max_tokens: int = 256) -> None:
        self.max_tokens = max_tokens
        self.kept: list[tuple[str, Tensor]] = []
        self.handles = watch_representations(model, self._keep)

    def _keep(self, name: str, x_BSD: Tensor) -> None:
        x_TD = x_BSD.detach().flatten(0, -2)
        step = -(-len(x_TD) // self.max_tokens)
        self.kept.append((name, x_TD[::step].clone()))

    def result(self) -> Tensor:
        """Return [N, N + 1]: this rank's matrix, and a column of ones, which counts ranks when
        results are added up."""
        matrix = cosine_matrix([x for _, x in self.kept])
        ones = torch.ones(len(matrix), 1, dtype=torch.float64)
        device = self.kept[0][1].device
        return torch.cat([matrix, ones], dim=1).to(device)

    def labels(self) -> list[str]:
        return [name for name, _ in self.kept]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def similarity_metrics(matrix: Any) -> dict[str, float]:
    """Return the mean similarity of neighbours, which have one sub-layer between them."""
    neighbours = torch.as_tensor(matrix).diagonal(1)
    return {"similarity/neighbours": float(neighbours.nanmean())}


class GradientProbe:
    """Notes the norm of the loss's gradient at every representation of one forward and backward
    pass, by hooks. Call `remove` after the pass.

    The loss is this rank's part of the step's: with accumulation, that of its batch over the number
    of batches. Where no gradient arrives, as behind frozen weights, the norm is 0.
    """

    def __init__(self, model: Any) -> None:
        self.names: list[str] = []
        self.norms: list[Tensor] = []
        self.handles = watch_representations(model, self._keep)

    def _keep(self, name: str, x_BSD: Tensor) -> None:
        depth = len(self.norms)
        self.names.append(name)
        self.norms.append(x_BSD.new_zeros((), dtype=torch.float64))
        if x_BSD.requires_grad:
            x_BSD.register_hook(partial(self._note, depth))

    def _note(self, depth: int, gradient_BSD: Tensor) -> None:
        self.norms[depth] = gradient_BSD.detach().double().norm()

    def result(self) -> Tensor:
        """Return [N, 2]: the norms, and a column of ones, which counts ranks when results are added
        up."""
        norms = torch.stack(self.norms)
        return torch.stack([norms, torch.ones_like(norms)], dim=1)

    def labels(self) -> list[str]:
        return self.names

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def gradient_metrics(norms_N1: Any) -> dict[str, float]:
    """Return the gradient's norm at the first representation over that at the last one."""
    return {"gradients/first_over_last": float(norms_N1[0, 0] / norms_N1[-1, 0])}
