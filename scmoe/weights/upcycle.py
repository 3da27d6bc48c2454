"""Copies the weights of a checkpoint into a model, unchanged, or from a dense checkpoint into an
MoE ("upcycling").

An upcycled model gives the dense model's output up to rounding, as long as no copy is dropped
(moe.capacity_factor):

    standard top-k          each expert is the MLP, and the gate's weights sum to one (top_k >= 2,
                            renormalised)
    shared-expert, ScMoE    the shared expert is the MLP, with twice its W_out where a coefficient
                            gate halves it (the gate's weights are 0, and sigmoid(0) = 1/2); experts
                            have the MLP's W_in and W_out = 0, so the routed output starts at 0 and
                            grows in training

The tap's own norm is the MLP's norm. The router's gate keeps its drawn weights.

Under expert parallelism a rank takes the experts that it holds. Shapes are compared on the meta
device; then one weight, or one expert, is read at a time.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import SharedExpertBlock, TopKBlock
from scmoe.moe.coefficient import DirectAdd
from scmoe.moe.experts import Experts
from scmoe.weights.pretrained import Checkpoint


@torch.no_grad()
def fill(
    model: Any, checkpoint: Checkpoint, put: Callable[[Tensor, Tensor], Any] = Tensor.copy_
) -> None:
    """Set every weight of `model` from the checkpoint.

    put: copies a value into a weight, or into the part of a weight that this rank holds. Raises
    ValueError, which names all mismatches, before any weight is set.
    """
    sources = weight_sources(model, checkpoint)
    parameters = dict(model.named_parameters())
    upcycled = is_upcycled(model, checkpoint)
    share = upcycled_weight if upcycled else share_here
    for name, source in sources.items():
        parameter = parameters[name]
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Experts) and not upcycled:
            for expert, weight in zip(module.expert_ids, parameter, strict=True):
                put(weight, checkpoint.read(source, expert))
        else:
            put(parameter, share(name, checkpoint.read(source, None), model))
    if upcycled:
        for block in model.blocks:
            if has_halves(block):
                block.coefficient.gate.weight.zero_()


def weight_sources(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Return for each weight of `model` the name of the weight in the checkpoint from which it is
    set. No weight is read.

    model: may be on the meta device. Raises ValueError, which names all mismatches.
    """
    parameters = dict(model.named_parameters())
    upcycled = is_upcycled(model, checkpoint)
    if upcycled:
        check_upcycling(model, checkpoint)
    share = upcycled_weight if upcycled else share_here
    sources = {}
    for name in parameters:
        source = dense_name(name, model) if upcycled else name
        if source is not None:  # a gate has none
            sources[name] = source

    problems = list(checkpoint.problems)
    for name, source in sources.items():
        wanted = parameters[name].shape
        weight = checkpoint.weights.get(source)
        if weight is None:
            if not checkpoint.problems:  # these already name the cause
                problems.append(f"{source} is missing")
        elif share(name, weight, model).shape != wanted:
            problems.append(
                f"{checkpoint.labels[source]} is {tuple(weight.shape)}, allowed: a shape that gives"
                f" {name} {tuple(wanted)}"
            )
    unused = checkpoint.weights.keys() - set(sources.values())
    problems += [f"{checkpoint.labels[name]} is unknown" for name in sorted(unused)]
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return sources


def is_upcycled(model: Any, checkpoint: Checkpoint) -> bool:
    """Return whether the model has an MoE and the checkpoint has none."""
    model_has_moe = any(".moe." in name for name, _ in model.named_parameters())
    checkpoint_has_moe = any(".moe." in name for name in checkpoint.weights)
    return model_has_moe and not checkpoint_has_moe


def check_upcycling(model: Any, checkpoint: Checkpoint) -> None:
    """Raise ValueError where the model cannot give the dense model's output."""
    for block in model.blocks:
        if isinstance(block, MoEBlock) and any(True for _ in block.after.parameters()):
            raise ValueError(
                "a dense checkpoint into an MoE requires moe.after_norm=false: no norm follows its"
                " MLPs"
            )
        if isinstance(block, MoEBlock) and block.moe.router.zero_experts:
            raise ValueError(
                "a dense checkpoint into an MoE requires moe.zero_experts=0: zero experts return"
                " their input, which would change the output"
            )
        if isinstance(block, TopKBlock):
            if not block.moe.router.normalise or block.moe.router.scoring.scale != 1:
                raise ValueError(
                    "a dense checkpoint into a top_k MoE requires moe.top_k >= 2 and weights that"
                    " sum to one: moe.renormalise or moe.router=deepseek, and moe.router_scale=1"
                )
            if any(name.endswith(".f.w_in.bias") for name in checkpoint.weights):
                raise ValueError(
                    "experts have no biases, but the checkpoint's MLPs do; a shared expert may have"
                    " them"
                )
        elif not isinstance(block, (SharedExpertBlock, ShortcutBlock)):
            wanted = "moe.architecture top_k, shared_expert or scmoe, and moe.leading_dense=[]"
            raise ValueError(f"a dense checkpoint into an MoE requires {wanted}")


def dense_name(name: str, model: Any) -> str | None:
    """Return the dense model's name for a parameter of an MoE model; None if it has none.

    A pair holds attention, MLP and attention of two dense blocks; with moe.every=1, a block holds
    one attention, with 4 the seven sub-layers of four dense blocks. The MLP of the last of these
    dense blocks, with its norm, becomes the MoE module.
    """
    match = re.fullmatch(
        r"blocks\.(\d+)\.(?:sublayers\.(\d)|(norm|tap_norm|shared_expert|moe|coefficient))\.(.+)",
        name,
    )
    if match is None:
        return name
    number, sublayer, part, rest = match.groups()
    block = int(number)
    dense_blocks = (len(model.blocks[block].sublayers) + 1) // 2  # in one block of the MoE model
    if sublayer is not None:
        dense_block = dense_blocks * block + int(sublayer) // 2
        return f"blocks.{dense_block}.sublayers.{int(sublayer) % 2}.{rest}"
    mlp = f"blocks.{dense_blocks * (block + 1) - 1}.sublayers.1"
    if part == "moe":
        sources = {
            "experts.w_in_eDF": f"{mlp}.f.w_in.weight",
            "experts.w_out_eFD": f"{mlp}.f.w_out.weight",
        }
        return sources.get(rest)
    if part == "coefficient":
        return None
    return f"{mlp}.f.{rest}" if part == "shared_expert" else f"{mlp}.norm.{rest}"


def upcycled_weight(name: str, weight: Tensor, model: Any) -> Tensor:
    """Return the parameter `name` of an MoE model, made from the dense model's weight."""
    if not name.startswith("blocks."):
        return share_here(name, weight, model)
    _, number, path = name.split(".", 2)
    block = model.blocks[int(number)]
    if path.startswith("moe.experts.") and weight.dim() == 2:
        copies = weight.T.expand(len(block.moe.experts.expert_ids), -1, -1)
        if path.endswith("w_out_eFD") and not isinstance(block, TopKBlock):
            return weight.new_zeros(()).expand_as(copies)
        return copies
    if path.startswith("shared_expert.w_out.") and has_halves(block):
        return 2 * weight
    return weight


def share_here(name: str, weight: Tensor, model: Any) -> Tensor:
    """Return the part of a weight that this model holds: this rank's experts, and the first
    max_seq_len positions."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, Experts) and weight.dim() == 3:
        return weight[module.expert_ids.start : module.expert_ids.stop]
    if name == "positions.weight" and weight.dim() == 2:
        return weight[: model.max_seq_len]
    return weight


def has_halves(block: Any) -> bool:
    """Return whether a gate weighs shared and routed output. With weights of 0 it halves the shared
    output."""
    return not isinstance(block, TopKBlock) and not isinstance(block.coefficient, DirectAdd)
