"""What the operators of a model do, counted while the model runs on tensors without numbers.

The model is the library's own, with all experts on one rank and the rows of an even load, so its
products, layouts and casts are those of a training: no formula of an architecture stands here. Each
call of torch that makes or changes a tensor is a kernel. Left out: backward, which timed_blocks.py
takes as twice as many kernels, and the loss but for its bytes.

An attention is one kernel that keeps no scores, whatever the widths of its heads, and that skips
what a causal mask hides: half of the products. torch has such a kernel on cards for most widths;
others are priced as if it had.

What a block does before it routes, and what the model does between it and the preceding block, are
parts of its BEFORE. What it does outside of any operator after it has routed counts as decode.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from scmoe.blocks.moe_block import MoEBlock, moe_blocks_of
from scmoe.blocks.sublayers import Residual, SelfAttention, outermost
from scmoe.moe import experts
from scmoe.parallel.dense.memory import RankJob
from scmoe.predict.counted_step import Call, Counting, give_storages, tensors_in, without_numbers
from scmoe.schedule.play import TRANSFERS
from scmoe.schedule.schedule import Schedule

OUTSIDE = "outside"  # of any operator


class Kernel(NamedTuple):
    """A call of torch. moved: bytes that it reads and writes; weights: those of parameters, and of
    what is cast from them. for_each_expert: it is one of a loop over all experts."""

    flops: float
    moved: float
    weights: float
    for_each_expert: bool = False


class Part(NamedTuple):
    """A run of an operator, or what runs between two of them.

    dense, expert: numbers of parameters that get their last gradient in its backward. rows_bytes:
    that a transfer gets.
    """

    operator: str
    kernels: tuple[Kernel, ...]
    dense: int = 0
    expert: int = 0
    rows_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return sum(kernel.flops for kernel in self.kernels)


class Layer(NamedTuple):
    """A block with an MoE: its parts before it routes, and after; and the copies of a token that it
    routes."""

    schedule: Schedule
    before: tuple[Part, ...]
    after: tuple[Part, ...]
    top_k: int


@dataclass(frozen=True, eq=False)
class Costs:
    """A forward pass of a rank's batch. Equal layers are one object.

    head: the parts after the last layer. tokens: of the batch;
    token_bytes: of the residual stream as products read it, of all tokens.
    dense_parameters: of every rank; expert_parameters: of all experts. logits_bytes: in the type of
    the loss.
    """

    layers: Sequence[Layer]
    head: tuple[Part, ...]
    tokens: int
    token_bytes: float
    dense_parameters: int
    expert_parameters: int
    logits_bytes: float
    job: RankJob

    @property
    def flops(self) -> float:
        parts = [part for layer in self.layers for part in (*layer.before, *layer.after)]
        return sum(part.flops for part in (*parts, *self.head))


@dataclass
class _Open:
    """A part that is being counted. block: its number; -1: none."""

    block: int
    operator: str
    kernels: list[Kernel] = field(default_factory=list)
    parameters: dict[nn.Parameter, None] = field(default_factory=dict)
    rows_bytes: float = 0.0


def count(model: Any, job: RankJob, batch: Tensor, batches: int = 1) -> Costs:
    """Return what a rank does in one forward pass.

    model: on the meta device, with all experts, in one chunk, and rows whose number does not depend
    on the data. batch: token ids or images of the rank. batches: so many are counted in one, and
    what grows with rows is divided by it, so that an expert's rows need not be a whole number.
    """
    blocks = moe_blocks_of(model)
    with ExitStack() as inside:
        inside.enter_context(without_numbers(job.on_gpu))
        model.to(torch.bfloat16 if job.precision == "bf16-true" else torch.float32)
        give_storages(model)
        kernels = Kernels(model)
        in_turn = kernels.noting_a_loop(experts.mlps_in_turn)
        inside.enter_context(patch.object(experts, "mlps_in_turn", in_turn))
        one_kernel = patch.object(functional, "scaled_dot_product_attention", kernels.attention)
        inside.enter_context(one_kernel)
        for number, block in enumerate(blocks):
            recorder: Any = _Noting(kernels, number)
            block.run_as(block.schedule, block.moe.dispatcher, recorder)
        shape = (batches * len(batch), *batch.shape[1:])
        inputs = torch.empty(shape, dtype=batch.dtype)
        inside.enter_context(kernels.beginning_with(model))
        inside.enter_context(torch.no_grad())
        narrow = job.precision == "bf16-mixed"
        inside.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=narrow))
        with Counting(kernels.note):
            logits = model(inputs)[0]
        size = logits.numel() / batches

    of_experts = {p for block in blocks for p in block.moe.experts.parameters()}
    layers, head = _in_layers(kernels.parts_of_one(batches), blocks, of_experts)
    in_experts = sum(p.numel() for p in of_experts)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = blocks[0].moe
    rows, width = model.rows_per_sample(job.seq_len)[first], first.experts.w_in_eDF.shape[1]
    return Costs(
        layers,
        head,
        tokens=round(job.samples * rows),
        token_bytes=job.samples * rows * width * job.compute_bytes,
        dense_parameters=total - in_experts,
        expert_parameters=in_experts,
        logits_bytes=size * job.wide_bytes,
        job=job,
    )


def _in_layers(
    parts: Sequence[_Open], blocks: Sequence[MoEBlock], of_experts: set[nn.Parameter]
) -> tuple[list[Layer], tuple[Part, ...]]:
    """Return the layers and the head."""
    seen: set[nn.Parameter] = set()  # a parameter that is used twice has its gradient at the first
    befores: list[list[Part]] = [[] for _ in blocks]
    afters: list[list[Part]] = [[] for _ in blocks]
    waiting: list[Part] = []
    for part in parts:
        if not part.kernels and not part.rows_bytes:
            continue
        fresh = [p for p in part.parameters if p not in seen and p.requires_grad]
        seen.update(fresh)
        expert = sum(p.numel() for p in fresh if p in of_experts)
        dense = sum(p.numel() for p in fresh) - expert
        closed = Part(part.operator, tuple(part.kernels), dense, expert, part.rows_bytes)
        if part.block < 0:
            waiting.append(closed)
            continue
        befores[part.block] += waiting
        waiting = []
        routed = part.operator == "route" or afters[part.block]
        (afters if routed else befores)[part.block].append(closed)
    unique: dict[Layer, Layer] = {}
    layers = [
        Layer(block.schedule, tuple(before), tuple(after), block.moe.router.top_k)
        for block, before, after in zip(blocks, befores, afters, strict=True)
    ]
    return [unique.setdefault(layer, layer) for layer in layers], tuple(waiting)


class Kernels:
    """The kernels of each part."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = [_Open(-1, OUTSIDE)]
        # by storage: a parameter, or the one that a tensor was cast from
        self.weights = {p.untyped_storage()._cdata: p for p in model.parameters()}
        self.casts: list[Tensor] = []  # kept, so that no other tensor gets their storages
        self.in_loop = False  # over all experts

    def parts_of_one(self, batches: int) -> list[_Open]:
        """Return the parts for one of so many batches that were counted in one."""
        for part in self.parts:
            part.kernels = [
                k._replace(flops=k.flops / batches, moved=k.moved / batches) for k in part.kernels
            ]
            part.rows_bytes /= batches
        return self.parts

    def noting_a_loop(self, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function that runs its kernels once for each expert, with a note of that."""

        def noted(*inputs: Any) -> Tensor:
            self.in_loop = True
            outputs = f(*inputs)
            self.in_loop = False
            return outputs

        return noted

    def attention(
        self,
        q_BHSd: Tensor,
        k_BGLd: Tensor,
        v_BGLv: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        """Take the place of torch's attention: one kernel that reads its inputs and writes its
        outputs."""
        batch, heads, queries, width = q_BHSd.shape
        keys, value_width = v_BGLv.shape[-2:]
        y_BHSv = q_BHSd.new_empty(batch, heads, queries, value_width)
        scores = batch * heads * queries * keys * (0.5 if is_causal else 1.0)
        tensors = [q_BHSd, k_BGLd, v_BGLv, y_BHSv, *([] if mask is None else [mask])]
        moved = sum(tensor.nbytes for tensor in tensors)
        flops = 2.0 * scores * (width + value_width)
        self.parts[-1].kernels.append(Kernel(flops, float(moved), 0.0))
        return y_BHSv

    def beginning_with(self, model: Any) -> ExitStack:
        """Let a part begin where a step of the model begins and ends, and where a sub-layer of a
        dense block does. Return what removes that."""
        numbers: dict[Any, int] = {b: number for number, b in enumerate(moe_blocks_of(model))}
        handles = ExitStack()
        for step in [*model.steps, model.norm]:
            self.begin_with(step, numbers.get(step, -1), OUTSIDE, handles)
            if step not in numbers:
                for sublayer in outermost(step, (Residual,)):
                    self.begin_with(sublayer, -1, operator_of(sublayer), handles)
        return handles

    def begin_with(self, module: nn.Module, block: int, operator: str, handles: ExitStack) -> None:
        """Let a part begin where a module begins, and another one where it ends."""

        def begin(*_: Any) -> None:
            self.parts.append(_Open(block, operator))

        def end(*_: Any) -> None:
            self.parts.append(_Open(-1, OUTSIDE))

        handles.callback(module.register_forward_pre_hook(begin).remove)
        handles.callback(module.register_forward_hook(end).remove)

    def note(self, call: Call) -> None:
        func = call.operator
        written_to = {argument.name for argument in func._schema.arguments if argument.is_out}
        read = [value for name, value in call.kwargs.items() if name not in written_to]
        inputs = list(tensors_in([*call.args, *read]))
        outputs = list(tensors_in([call.out]))
        if is_kernel(func, inputs, outputs):
            self.add_kernel(func, inputs, outputs, float(call.flops))

    def add_kernel(
        self, func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor], flops: float
    ) -> None:
        part = self.parts[-1]
        sources = [self.weights.get(tensor.untyped_storage()._cdata) for tensor in inputs]
        part.parameters |= dict.fromkeys(p for p in sources if p is not None)
        weights = sum(
            tensor.nbytes for tensor, p in zip(inputs, sources, strict=True) if p is not None
        )
        moved = sum(tensor.nbytes for tensor in inputs) - weights
        written = sum(tensor.nbytes for tensor in outputs)
        if func.overloadpacket is torch.ops.aten._to_copy and sources[0] is not None:
            self.weights[outputs[0].untyped_storage()._cdata] = sources[0]
            self.casts += outputs
            weights += written
        elif func.overloadpacket is torch.ops.aten.embedding:  # it reads as much as it writes
            weights = 0
            moved += 2 * written
        else:
            moved += written
        part.kernels.append(Kernel(flops, moved, weights, self.in_loop))


@dataclass
class _Noting:
    """Takes the place of a Recorder. An operator inside another one is not noted separately."""

    kernels: Kernels
    block: int
    inside_operator: bool = False

    def around(self, name: str, f: Any, *inputs: Any) -> Any:
        if self.inside_operator:
            return f(*inputs)
        rows = inputs[0].nbytes if name in TRANSFERS else 0
        self.kernels.parts.append(_Open(self.block, name, rows_bytes=float(rows)))
        self.inside_operator = True
        result = f(*inputs)
        self.inside_operator = False
        self.kernels.parts.append(_Open(self.block, OUTSIDE))
        return result


def operator_of(sublayer: Any) -> str:
    """Return the operator that a sub-layer of a dense block is."""
    return "attention" if isinstance(sublayer.f, SelfAttention) else "mlp"


def is_kernel(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Return whether a call computes: views and fresh memory do not."""
    if func._schema.is_mutable:
        return True
    if "empty" in func.name():
        return False
    before = {tensor.untyped_storage()._cdata for tensor in inputs}
    return any(tensor.untyped_storage()._cdata not in before for tensor in outputs)
