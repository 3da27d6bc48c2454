"""Memory of a rank of a training: exact weights, gradients and moments, and an upper bound on the
rest of a step.

    weights       one number per parameter that the rank holds: the replicated ones, and 1 / EP of
                  the experts; where dense weights are split over ranks, its parts of both
    gradients     the same, without the routers' selection biases
    optimizer     AdamW: two moments per parameter, and a step count of 4 bytes per tensor; Muon:
                  one moment
    gathered      weights and gradients beside its own: gathered blocks, bfloat16 copies, gradients
                  on their way
    activations   what autograd keeps of a batch, and what the backward of one part allocates

`total` is the larger of two moments, the loss and the backward of the busiest block. It is an upper
bound: gradients count in full, though backward allocates most of them while it frees activations
(docs/decisions/0037-dry-run.md has bound / peak). It holds for dropless experts where no rank's
experts get more than `busiest_rows` times the rows of an even load.
Not counted: the allocator's gaps, SwinV2's position bias, which is kept once a batch, and what
chunks add that schedule=auto chooses.

What autograd keeps, in numbers a row. D is the width, A that of all heads together (usually D), F
the width inside an MLP, R the rows at the experts (empty slots included); w and a are 1 for GELU
and 2 for SwiGLU:

    norm                2 D                   input and output; on a CPU RMSNorm keeps a third
    attention           (1 + 2 kv/h) A + A    Q, K, V, result; Q, K, V again with rotary positions
    latent attention    4 Q + KV + V          Q, K twice; keys with values; result, 4 times if gated
    window attention    7 D + 2 h S           Q, K, V, normed Q and K; scores of S, in float32
    MLP, shared expert  (w + a) F             before and after the activation function
    experts             R (2 D + w F)         rows, results, before the function; + R a F on a GPU
    gate                3 E + D, in float32   and 3 indices of 8 bytes a row
    coefficient         D (CG-1) or 2 D (CG-2)
    dropout             D
    logits              3 V, in float32       log-probabilities, their gradient and the logits'

With activation checkpointing only the inputs of sub-layers are kept, D each. The largest sub-layer,
shared expert or experts module is computed again in its backward, with as many gradients. Under
autocast the residual stream and the inputs of norms are float32.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from scmoe.blocks.latent import LatentAttention
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.blocks.sublayers import MLP, Attention, Residual, SelfAttention, outermost
from scmoe.models.halves import sizes_of_halves
from scmoe.models.model_cost import COMPUTE_BYTES, WEIGHT_BYTES, moe_uses, rows_sent
from scmoe.moe.coefficient import CG1, CG2
from scmoe.moe.experts import Experts
from scmoe.parallel.dense.fsdp_units import (
    exact_parameters,
    router_parameters,
    units,
    whole_parameters,
)


@dataclass(frozen=True)
class RankJob:
    """What a training asks of each of its ranks.

    ranks: all of the job; ep_size of them share one set of experts, and node_size are on a node.
    samples: of a rank in one batch; accumulate: batches of a step. dense: replicated, sharded or
    hybrid. wire_bytes: of a number that is sent between ranks; None: as it is computed.
    parts: of a batch that go through the blocks in turns, at most. busiest_rows: of the experts of
    the busiest rank, over those of an even load.
    """

    ranks: int = 1
    ep_size: int = 1
    node_size: int = 1
    samples: int = 1
    seq_len: int = 1
    accumulate: int = 1
    precision: str = "32-true"
    dense: str = "replicated"
    recompute: bool = False
    on_gpu: bool = True
    wire_bytes: int | None = None
    parts: int = 1
    busiest_rows: float = 1.0

    @property
    def dp_size(self) -> int:
        """Return the number of ranks that hold the same experts."""
        return self.ranks // self.ep_size

    @property
    def samples_at_once(self) -> tuple[int, ...]:
        """Return the samples of each part of a batch."""
        return sizes_of_halves(self.samples) if self.parts == 2 else (self.samples,)

    @property
    def compute_bytes(self) -> int:
        """Return the bytes of a number that a product returns."""
        return COMPUTE_BYTES[self.precision]

    @property
    def wide_bytes(self) -> int:
        """Return the bytes of a number that stays in float32 or wider."""
        return max(4, self.compute_bytes)

    @property
    def stream_bytes(self) -> int:
        """Return the bytes of a number of the residual stream."""
        return self.wide_bytes if self.precision == "bf16-mixed" else self.compute_bytes


@dataclass(frozen=True)
class Split:
    """Which part of each parameter a rank holds, and what it gathers and sums. model: the whole
    model, on any device.

        replicated    dense weights whole on every rank; experts whole on the ranks that hold the
                      same ones (edp)
        sharded       dense weights over all ranks, experts over edp, each block gathered as one
                      unit (FSDP2)
        hybrid        dense weights over the ranks of a node, with a copy on each node; experts over
                      edp

    Dense weights are split on dim 0 into parts of ceil(rows / ranks) rows; the last parts may have
    fewer or none. A gather pads each part to the full size. Experts are split on dim 1, evenly.
    Under bf16-mixed, matrices are gathered in bfloat16, but routers and vectors in float32, and all
    gradients are summed in float32.
    """

    model: Any
    job: RankJob

    @cached_property
    def experts(self) -> set[nn.Parameter]:
        return {p for m in self.model.modules() if isinstance(m, Experts) for p in m.parameters()}

    @cached_property
    def exact(self) -> set[nn.Parameter]:
        """Return the parameters that stay in float32 when the others are gathered in bfloat16, or
        are kept in it."""
        true = self.job.precision == "bf16-true"
        return (router_parameters if true else exact_parameters)(self.model) - self.whole

    @cached_property
    def blocks(self) -> list[set[nn.Parameter]]:
        """Return the parameters of each block, which are gathered together, in the order of
        forward."""
        return [{*block.parameters()} - self.whole for block in units(self.model)]

    @cached_property
    def outside(self) -> set[nn.Parameter]:
        """Return the parameters outside blocks, which stay gathered from forward to the end of
        backward.
        """
        return {*self.model.parameters()}.difference(self.whole, *self.blocks)

    @cached_property
    def whole(self) -> set[nn.Parameter]:
        return whole_parameters(self.model)

    @cached_property
    def routers(self) -> set[nn.Parameter]:
        return router_parameters(self.model)

    def bytes_of(self, p: nn.Parameter) -> int:
        """Return the bytes of a number of a weight. A router's is never narrower than float32."""
        width = WEIGHT_BYTES[self.job.precision]
        return max(4, width) if p in self.routers else width

    def shards(self, p: nn.Parameter) -> int:
        """Return the number of ranks over which a parameter is split, beside the split of experts
        over EP."""
        if self.job.dense == "replicated" or p in self.whole:
            return 1
        if p in self.experts:
            return self.job.dp_size
        return self.job.node_size if self.job.dense == "hybrid" else self.job.ranks

    def held(self, p: nn.Parameter) -> int:
        """Return how many numbers of a parameter are on rank 0."""
        if p in self.experts:
            return p.numel() // self.job.ep_size // self.shards(p)
        return math.ceil(p.shape[0] / self.shards(p)) * (p.numel() // p.shape[0])

    def gathered_bytes(self, p: nn.Parameter) -> int:
        """Return the bytes of a parameter while it is whole, padding included."""
        narrow = self.job.precision == "bf16-mixed" and p not in self.exact
        return self.held(p) * self.shards(p) * (2 if narrow else self.bytes_of(p))

    def summed_bytes(self, p: nn.Parameter) -> int:
        """Return the bytes of a gradient in the sum over ranks; none of a frozen parameter."""
        if not p.requires_grad:
            return 0
        return (
            self.held(p)
            * self.shards(p)
            * (4 if self.job.precision.startswith("bf16") else self.bytes_of(p))
        )


def rank_memory(model: Any, job: RankJob, by_muon: Collection[nn.Parameter] = ()) -> dict[str, int]:
    """Return bytes on rank 0: weights, gradients, optimizer; at most: gathered, activations, and
    the total at the peak.

    model: the whole model, on any device. by_muon: parameters that Muon updates; AdamW updates the
    others.
    """
    split = Split(model, job)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights, gradients = (
        sum(split.held(p) * split.bytes_of(p) for p in some) for some in (parameters, trained)
    )
    optimizer = (
        2 * gradients
        + 4 * len(trained)
        - sum(split.held(p) * split.bytes_of(p) + 4 for p in by_muon)
    )
    gathered_at_loss, gathered_in_block = gathered(split)
    kept_at_loss, kept_in_block = activations(model, job)
    working = max(gathered_at_loss + kept_at_loss, gathered_in_block + kept_in_block)
    constant = sum(buffer.nbytes for buffer in model.buffers())
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "gathered": max(gathered_at_loss, gathered_in_block),
        "activations": max(kept_at_loss, kept_in_block),
        "total": weights + gradients + optimizer + working + constant,
    }


def gathered(split: Split) -> tuple[int, int]:
    """Return bytes of weights and gradients beside those that a rank holds: at the loss, and in a
    block's backward.

    replicated    autocast's copies of matrices; in backward one gradient before it is added, and
                  the experts' gradients while they are averaged
    split         the weights outside blocks and one block; in backward the head's gradient, a block
                  and the one before it, one gradient before it is put in order, and the block's
                  gradients in the reduce-scatter
    """
    job, parameters = split.job, list(split.model.parameters())
    if job.dense == "replicated":
        narrow = 0
        if job.precision == "bf16-mixed":
            apart = split.exact | split.experts
            narrow = 2 * sum(split.held(p) for p in parameters if p not in apart)
            pieces = {
                block.moe: block.schedule.chunks * job.parts
                for block in moe_blocks_of(split.model)
                if not job.recompute
            }
            # every gate, every chunk and every part of a batch has its own
            for moe, copies in moe_uses(split.model):
                uses = copies // moe.router.top_k * pieces.get(moe, 1)
                narrow += 2 * uses * sum(map(split.held, moe.experts.parameters()))
        held = {p: split.held(p) * split.bytes_of(p) for p in parameters}
        averaged = sum(held[p] for p in split.experts) if job.dp_size > 1 else 0
        return narrow, narrow + max(held.values()) + averaged
    most, before = sum(map(split.summed_bytes, split.outside)), 0
    for block in split.blocks:
        sizes = [split.gathered_bytes(p) for p in block]
        most = max(most, before + sum(sizes) + max(sizes) + sum(map(split.summed_bytes, block)))
        before = sum(sizes)
    outside = sum(map(split.gathered_bytes, split.outside))
    head = sum(map(split.gathered_bytes, split.model.head.parameters()))
    return outside + before, outside + head + most


def activations(model: Any, job: RankJob) -> tuple[int, int]:
    """Return bytes of a batch's activations and their gradients: at the loss, and in the busiest
    block's backward."""
    rows = model.rows_per_sample(job.seq_len)
    of_steps = {module for step in model.steps for module in step.modules()}
    kept = sum(
        rows.get(module, 0.0) * kept_by(module, 0, job)
        for module in model.modules()
        if module not in of_steps
    )
    busiest = 0.0
    for step in model.steps:
        outside, inputs, parts = kept_in(step, rows, job)
        kept += outside + (inputs if job.recompute else sum(parts))
        largest = max(parts, default=0.0)  # its gradients, and itself where it is computed again
        busiest = max(busiest, kept + (2 * largest if job.recompute else largest))
    logits = rows[model.head] * model.head.out_features * job.wide_bytes
    return round(job.samples * (kept + 3 * logits)), round(job.samples * busiest)


def kept_in(
    step: nn.Module, rows: Mapping[nn.Module, float], job: RankJob
) -> tuple[float, float, list[float]]:
    """Return the bytes of one sample that autograd keeps in a step of forward: outside the parts
    that checkpointing computes again, as inputs of these parts, and inside each of them."""
    parts = list(outermost(step, (Residual, MLP)))
    residuals = [part for part in parts if isinstance(part, Residual)]
    dim: Any = residuals[0].f.dim if residuals else 0
    inside = [
        sum(rows.get(module, 0.0) * kept_by(module, dim, job) for module in part.modules())
        for part in parts
    ]
    outside = sum(
        rows.get(module, 0.0) * kept_by(module, dim, job) for module in step.modules()
    ) - sum(inside)
    for moe, copies in moe_uses(step):
        gates = copies // moe.router.top_k
        num_rows = rows_sent(moe, copies) * rows[moe] * job.busiest_rows
        _, width, hidden = moe.experts.w_in_eDF.shape
        if job.on_gpu:
            hidden += moe.experts.act.widening * moe.experts.w_out_eFD.shape[1]
        outside += num_rows * (2 * width * job.compute_bytes + 3 * 8)
        outside += gates * rows[moe] * (3 * moe.router.num_ids + width) * job.wide_bytes
        inside += [num_rows / gates * hidden * job.compute_bytes for _ in range(gates)]
    return outside, sum(rows[part] for part in residuals) * dim * job.stream_bytes, inside


def kept_by(module: Any, dim: int, job: RankJob) -> float:
    """Return the bytes of one row that autograd keeps in a module, without its submodules. dim: of
    the stream."""
    c = job.compute_bytes
    if isinstance(module, nn.LayerNorm):
        return module.weight.numel() * (job.stream_bytes + c)
    if isinstance(module, nn.RMSNorm):  # it is one kernel on a GPU
        return module.weight.numel() * (
            job.stream_bytes + c + (0 if job.on_gpu else job.wide_bytes)
        )
    if isinstance(module, Attention):
        turned = 0 if module.rotary is None else module.qkv.out_features
        return c * (module.qkv.out_features + turned + module.out.in_features)
    if isinstance(module, LatentAttention):  # a key's part for all heads is copied to each
        q = module.q_up.out_features
        kv = module.kv_up.out_features
        v = module.out.in_features
        return c * (4 * q + kv + (4 if module.gate is not None else 1) * v)
    if isinstance(module, SelfAttention):  # not one kernel: it keeps its scores
        return c * 7 * module.dim + 2 * job.wide_bytes * module.heads * module.context(job.seq_len)
    if isinstance(module, MLP):
        return c * (module.w_in.out_features + module.act.widening * module.w_out.in_features)
    if isinstance(module, (CG1, CG2)):
        return c * module.gate.in_features * module.gate.out_features
    if isinstance(module, nn.Dropout) and module.p > 0:
        return dim * (1 if job.on_gpu else c)
    return 0.0
