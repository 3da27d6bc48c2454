"""Memory of a rank: weights, gradients and the optimizer's moments are exact, activations are an estimate.

    weights       one number per parameter that the rank holds: the replicated ones, and 1 / EP of the experts; where
                  dense weights are split over ranks, its parts of both (footprint/split.py)
    gradients     the same
    optimizer     AdamW: two moments per parameter, and a step count of 4 bytes per tensor; Muon: one moment

Activations are what autograd keeps between forward and backward. The table counts numbers per row: D is the width, F
the width inside an MLP, R the rows at the experts (empty slots included); w and a are 1 for GELU and 2 for SwiGLU:

    norm                  2 D                     its input and its output; of the tap's norm only the output
    attention             (1 + 2 kv/h) D + D      Q, K, V and their result; + (1 + kv/h) D with rotary positions
    window attention      7 D + 2 h S             SwinV2's: normed Q and K as well as Q, K, V; scores of the window's S
    MLP, shared expert    (w + a) F               before and after the activation function
    experts               R (2 D + w F)           rows, results, before the function; + R a F on a GPU
    gate                  3 E, in float32         + x in float32 where rows are narrower; 3 indices of 8 bytes a row
    coefficient           D (CG-1) or 2 D (CG-2)
    dropout               D, on a GPU in bytes
    head                  V, in float32           log-probabilities

With activation checkpointing only the inputs of sub-layers are kept, D each, and the inside of the largest sub-layer,
shared expert or experts module is there while its backward runs. Under autocast the residual stream and the inputs of
norms are float32, and each product keeps a narrow copy of its weight.

`total` is what is there when most is. The experts' gradients come while activations go, so it is less than the sum:
footprint/step_memory.py looks at each block's backward, and says what is there besides. Not counted: the allocator's
gaps.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from scmoe.footprint.split import Split
from scmoe.footprint.stages import Stage, stages
from scmoe.footprint.step_memory import narrow_copies, step_peak


def rank_memory(
    model: Any,
    *,
    seq_len: int,
    samples: int,
    precision: str,
    ep_size: int,
    dp_size: int,
    recompute: bool,
    on_gpu: bool,
    dense: str = "replicated",
    node_size: int = 1,
    by_muon: Collection[nn.Parameter] = (),
    accumulate: int = 1,
) -> dict[str, int]:
    """Bytes on rank 0: weights, gradients, optimizer, the largest block while it is gathered (0: none is), activations,
    and the total when most is there.

    model: the whole model, on any device. samples: samples of one rank in one batch. dp_size: number of ranks that hold
    the same experts. dense: replicated, sharded or hybrid; node_size: ranks of a node. by_muon: parameters that Muon
    updates; AdamW updates the others. accumulate: batches of a step."""
    split = Split(model, dense, ep_size, dp_size, node_size, precision)
    parameters = list(model.parameters())
    weights = sum(split.held(p) for p in parameters) * split.width
    found = stages(model, seq_len, precision, on_gpu)
    kept, repeated = kept_and_repeated(found, recompute)
    narrow = sum(narrow_copies(split, stage, recompute) for stage in found)
    optimizer = 2 * weights + 4 * len(parameters) - sum(split.held(p) * split.width + 4 for p in by_muon)
    moment = step_peak(split, found, samples, recompute, accumulate > 1)
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": optimizer,
        "gathered": 0 if dense == "replicated" else max(map(split.gathered_block, model.blocks)),
        "activations": round(samples * (kept + repeated)) + narrow,
        "total": weights + optimizer + round(moment) + sum(buffer.nbytes for buffer in model.buffers()),
    }


def activations(model: Any, seq_len: int, precision: str, recompute: bool, on_gpu: bool = True) -> tuple[float, float]:
    """Bytes of one sample: what autograd keeps, and the largest part that is computed again at one time."""
    return kept_and_repeated(stages(model, seq_len, precision, on_gpu), recompute)


def kept_and_repeated(found: Sequence[Stage], recompute: bool) -> tuple[float, float]:
    if recompute:
        return sum(s.kept + s.inputs for s in found), max(max(s.inside.values(), default=0.0) for s in found)
    return sum(s.kept + sum(s.inside.values()) for s in found), 0.0
