"""What autograd keeps of a sample between forward and backward, block by block; memory.py has a table of them."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.sublayers import MLP, Residual, SelfAttention
from scmoe.footprint.model_cost import COMPUTE_BYTES, own_moe_uses, rows_sent
from scmoe.moe.coefficient import CG1, CG2


@dataclass
class Stage:
    """Bytes of one sample in one block, in the modules before the blocks, or in the modules after them.

    kept: what autograd keeps from forward to backward. inside: activations in each part that checkpointing recomputes;
    without checkpointing they are kept too. inputs: inputs of these parts, which checkpointing keeps. gradients: extra
    bytes during each part's backward. once: bytes of a part for a batch of any size. stream: of the residual stream."""

    modules: set[nn.Module]
    kept: float = 0.0
    inside: defaultdict[Any, float] = field(default_factory=lambda: defaultdict(float))
    inputs: float = 0.0
    gradients: defaultdict[Any, float] = field(default_factory=lambda: defaultdict(float))
    once: defaultdict[Any, float] = field(default_factory=lambda: defaultdict(float))
    stream: float = 0.0


def stages(model: Any, seq_len: int, precision: str, on_gpu: bool) -> list[Stage]:
    """Return what comes before the blocks, the blocks in their order, and what comes after them."""
    c = COMPUTE_BYTES[precision]
    wide = max(4, c)  # what stays in float32
    stream = 4 if precision == "bf16-mixed" else c  # of the residual stream
    steps = 0 if on_gpu else 1  # RMSNorm is one kernel on a GPU
    rows = model.rows_per_sample(seq_len)
    last = Stage({*model.norm.modules(), *model.head.modules()})
    of_blocks = [Stage(set(block.modules())) for block in model.steps]
    first = Stage(set(model.modules()).difference(last.modules, *(s.modules for s in of_blocks)))
    stage_of = {module: s for s in (first, *reversed(of_blocks), last) for module in s.modules}
    unit_of: dict[nn.Module, nn.Module] = {}  # the sub-layer or the shared expert that a module is a part of
    for unit in model.modules():
        if isinstance(unit, (Residual, MLP)):
            unit_of = dict.fromkeys(unit.modules(), unit) | unit_of
    for name, module in model.named_modules():
        if name.endswith("tap_norm"):
            continue
        size = rows.get(module, 0.0) * _kept_by(module, c, stream, steps)
        if isinstance(module, MoEBlock) and module.tap_norm is not None:
            # its input is kept by the norm after the tap, which may be the same module
            size = rows[module] * _kept_by(module.tap_norm, c, 0, steps)
        if isinstance(module, nn.Dropout) and module.p > 0:  # pictures have drop path, which keeps a number a sample
            size = rows[module] * model.tokens.embedding_dim * (1 if on_gpu else c)
        stage, unit = stage_of[module], unit_of.get(module)
        if unit is None:
            stage.kept += size
        else:
            stage.inside[unit] += size
            stage.gradients[unit] += rows[module] * _gradients_in(module, c)
            stage.once[unit] += module.kept_once_bytes(c) if isinstance(module, SelfAttention) else 0.0
        if isinstance(module, Residual):
            stage.inputs += rows[module] * module.f.dim * stream
            stage.stream = rows[module] * module.f.dim * stream
    for i, (stage, block) in enumerate(zip(of_blocks, model.steps, strict=True)):
        for moe, copies in own_moe_uses(block):
            num_rows, gates = rows_sent(moe, copies) * rows[moe], copies / moe.router.top_k * rows[moe]
            _, dim, hidden = moe.experts.w_in_eDF.shape
            stage.kept += num_rows * (2 * dim * c + 3 * 8)
            stage.kept += gates * (3 * moe.router.num_experts * wide + (dim * wide if c < 4 else 0))
            stage.inside[f"experts {i}"] = num_rows * c * (hidden + on_gpu * _after(moe.experts))
            stage.gradients[f"experts {i}"] = num_rows * c * (2 * dim + _after(moe.experts))
    logits = rows[model.head] * model.head.out_features * wide
    last.kept += logits
    last.gradients["loss"] = 2 * logits  # of the log-probabilities and of the logits, at one time
    return [first, *of_blocks, last]


def _kept_by(module: Any, c: int, stream: int, steps: int) -> float:
    """Bytes of one row that the module itself keeps, without its submodules. steps: wide rows that RMSNorm keeps."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return module.weight.numel() * (stream + c + isinstance(module, nn.RMSNorm) * steps * max(4, c))
    if isinstance(module, SelfAttention):
        return module.kept_bytes(c)
    if isinstance(module, MLP):
        return c * (module.w_in.out_features + _after(module))
    if isinstance(module, (CG1, CG2)):
        return c * module.gate.in_features * module.gate.out_features
    return 0.0


def _gradients_in(module: Any, c: int) -> float:
    """Bytes of one row that are there in a part's backward, beside what it has kept."""
    if isinstance(module, SelfAttention):  # of everything that it has kept
        return module.kept_bytes(c)
    return c * _after(module) if isinstance(module, MLP) else 0.0


def _after(mlp: Any) -> int:
    """Numbers of a row that are kept after the activation function; for SwiGLU the product and one of its factors."""
    out = mlp.w_out.in_features if isinstance(mlp, MLP) else mlp.w_out_eFD.shape[1]
    return mlp.act.widening * out
