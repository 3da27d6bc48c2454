"""From configuration to the network: which family, which blocks, which parts.

A family is a function of `FAMILIES`: it makes the parts and the sub-layers and stacks the blocks. An architecture is a
function of `ARCHITECTURES`: it wires one block, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scmoe.blocks.double_gate import DoubleGateBlock, share_moe
from scmoe.blocks.recompute import recompute_activations
from scmoe.blocks.rotary import Rotary
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.blocks.standard import DenseBlock, SharedExpertBlock, TopKBlock
from scmoe.blocks.sublayers import MLP, Attention, Residual
from scmoe.config import Config, flatten
from scmoe.config_check import SHORTCUTS, ConfigError, show
from scmoe.models.gpt import GPT
from scmoe.models.llama import NORM_EPS, Llama
from scmoe.moe.coefficient import COEFFICIENT_GATES
from scmoe.moe.dispatcher import Narrowed
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import ParallelContext
from scmoe.schedule.plan import Schedule
from scmoe.training.pretrained import read_export, read_hf
from scmoe.training.upcycle import fill


def build_model(config: Config, context: ParallelContext) -> Any:
    """The network with this rank's experts, weights drawn from the seed."""
    model = FAMILIES[config.model.family](config, context)
    model.init_weights(config.seed)
    if config.trainer.recompute:
        recompute_activations(model)
    return model


def build_model_to_train(config: Config, context: ParallelContext) -> Any:
    """The network at the start of a training: drawn from the seed, or with the weights of init_from.

    Raises ConfigError: these are another model's, or cannot be read."""
    model = build_model(config, context)
    if config.init_from is None:
        return model
    kind, _, path = config.init_from.partition(":")
    try:
        checkpoint = read_hf(Path(path)) if kind == "hf" else read_export(Path(path))
        check_settings(settings(config), checkpoint.settings)
        fill(model, checkpoint)
    except ValueError as error:
        raise ConfigError(f"init_from is {show(config.init_from)}: {error}") from error
    return model


def check_settings(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """ValueError, naming every key: a checkpoint was made with other settings. A dense one may become any MoE."""
    other = [
        f"{key} is {show(here[key]) if key in here else 'unknown'}, allowed: {show(value)}"
        for key, value in there.items()
        if here.get(key, there) != value and (key, value) != ("moe.architecture", "dense")
    ]
    if other:
        raise ValueError(f"its weights were made with other settings: {'; '.join(other)}")


def settings(config: Config) -> dict[str, Any]:
    """The config's values by key, with those that follow from others."""
    model, moe = config.model, config.moe
    resolved: dict[str, Any] = {"moe.first_position": moe.first_position or moe.position}
    if model.family in PARTS:
        parts = PARTS[model.family](config)
        resolved |= {"model.ffn_dim": parts.ffn_dim, "model.activation": parts.activation}
        resolved |= {"model.kv_heads": model.kv_heads or model.heads}
    return flatten(config) | resolved


def model_settings(config: Config) -> dict[str, Any]:
    """Those that make the network what it is: whoever takes its weights must have the same. An export's header."""
    architecture, keys = config.moe.architecture, ["model.family", "model.layers", "model.dim", "model.heads"]
    if config.model.family == "swin":
        keys += ["model.patch_size", "model.window", "data.image_size", "data.num_classes"]
    else:
        keys += ["model.kv_heads", "model.ffn_dim", "model.activation", "data.vocab_size"]
    keys.append("moe.architecture")
    if architecture != "dense":
        keys += ["moe.num_experts", "moe.top_k", "moe.renormalise", "moe.noisy", "moe.every"]
    if architecture in SHORTCUTS:
        keys += ["moe.position", "moe.first_position", "moe.tap_norm"]
    if architecture in ("shared_expert", "scmoe"):
        keys += ["moe.combine", "moe.coefficient_input"]
    here = settings(config)
    return {key: here[key] for key in keys}


def build_model_on_meta(config: Config) -> Any:
    """The whole network's shapes, without memory: to count parameters before anything is started."""
    with torch.device("meta"):
        return FAMILIES[config.model.family](config, ParallelContext())


# ---------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Parts:
    """What a family makes its blocks of, at one width."""

    dim: int
    ffn_dim: int
    norm: Callable[[], nn.Module]
    mlp: Callable[[], nn.Module]  # of Block-MLP, and the shared expert
    attention: Callable[[], nn.Module]
    after: Callable[[], nn.Module]  # what a sub-layer's output goes through before it is added: dropout
    activation: str = "gelu"  # of the routed experts

    def attention_sublayer(self) -> Residual:
        return Residual(self.norm(), self.attention(), self.after())

    def mlp_sublayer(self) -> Residual:
        return Residual(self.norm(), self.mlp(), self.after())


def gpt_parts(config: Config) -> Parts:
    model = config.model
    dim, ffn_dim, activation = model.dim, model.ffn_dim or 4 * model.dim, model.activation or "gelu"
    return Parts(
        dim,
        ffn_dim,
        norm=lambda: nn.LayerNorm(dim),
        mlp=lambda: MLP(dim, ffn_dim, activation=activation),
        attention=lambda: Attention(dim, model.heads, kv_heads=model.kv_heads),
        after=lambda: nn.Dropout(model.dropout),
        activation=activation,
    )


def llama_parts(config: Config) -> Parts:
    model = config.model
    dim, ffn_dim, activation = model.dim, model.ffn_dim or 4 * model.dim, model.activation or "swiglu"
    return Parts(
        dim,
        ffn_dim,
        norm=lambda: nn.RMSNorm(dim, NORM_EPS),
        mlp=lambda: MLP(dim, ffn_dim, bias=False, activation=activation),
        attention=lambda: Attention(dim, model.heads, bias=False, kv_heads=model.kv_heads, rotary=Rotary()),
        after=lambda: nn.Dropout(model.dropout),
        activation=activation,
    )


PARTS: dict[str, Callable[[Config], Parts]] = {"gpt": gpt_parts, "llama": llama_parts}


# ---------------------------------------------------------------------- blocks


def build_blocks(config: Config, context: ParallelContext) -> list[nn.Module]:
    """The blocks of a model whose layers are all alike."""
    parts = PARTS[config.model.family](config)
    return stack(config, context, [parts] * config.model.layers)


def stack(config: Config, context: ParallelContext, parts: Sequence[Parts]) -> list[nn.Module]:
    """Layers made of `parts`: blocks with an MoE each (every: 1), pairs of Block-MLP and Block-MoE (every: 2), or dense
    blocks."""
    architecture = config.moe.architecture
    if architecture == "dense":
        return [DenseBlock([layer.attention_sublayer(), layer.mlp_sublayer()]) for layer in parts]
    every, blocks = config.moe.every, []
    for i in range(0, len(parts), every):
        first, last = parts[i], parts[i + every - 1]
        sublayers = [first.attention_sublayer()]
        if every == 2:
            sublayers += [first.mlp_sublayer(), last.attention_sublayer()]
        blocks.append(ARCHITECTURES[architecture](config, context, last, sublayers, i == 0))
    if architecture == "dgmoe_share":
        share_moe(blocks)
    return blocks


def top_k_block(
    config: Config, context: ParallelContext, parts: Parts, sublayers: Sequence[nn.Module], first: bool
) -> nn.Module:
    return TopKBlock(sublayers, parts.norm(), build_stream(config, context, parts), parts.after())


def shared_expert_block(
    config: Config, context: ParallelContext, parts: Parts, sublayers: Sequence[nn.Module], first: bool
) -> nn.Module:
    return SharedExpertBlock(
        sublayers,
        parts.norm(),
        parts.mlp(),
        COEFFICIENT_GATES[config.moe.combine](parts.dim),
        build_stream(config, context, parts),
        Schedule("shared_expert", config.schedule.slot, config.schedule.chunks or 1),
        parts.after(),
    )


def shortcut_block(
    config: Config, context: ParallelContext, parts: Parts, sublayers: Sequence[nn.Module], first: bool
) -> nn.Module:
    """first: the model's first MoE module, whose tap may be elsewhere."""
    moe = config.moe
    position = moe.first_position if first and moe.first_position else moe.position
    schedule = Schedule(position, config.schedule.slot, config.schedule.chunks or 1)
    following: Any = sublayers[len(sublayers) - (len(schedule.window) - 1)]  # the sub-layer after the tap
    return ShortcutBlock(
        sublayers,
        tap_norm=following.norm if moe.tap_norm == "shared" else parts.norm(),
        norm=parts.norm(),
        shared_expert=parts.mlp(),
        coefficient=COEFFICIENT_GATES[moe.combine](parts.dim),
        moe=build_stream(config, context, parts),
        schedule=schedule,
        after=parts.after(),
        coefficient_reads_tap=moe.coefficient_input == "tap",
    )


def double_gate_block(
    config: Config, context: ParallelContext, parts: Parts, sublayers: Sequence[nn.Module], first: bool
) -> nn.Module:
    moe = config.moe
    position = moe.first_position if first and moe.first_position else moe.position
    schedule = Schedule(f"dgmoe_{position}", config.schedule.slot, config.schedule.chunks or 1)
    following: Any = sublayers[len(sublayers) - len(schedule.window)]  # the sub-layer after the tap
    return DoubleGateBlock(
        sublayers,
        tap_norm=following.norm if moe.tap_norm == "shared" else parts.norm(),
        norm=parts.norm(),
        moe=build_stream(config, context, parts),
        schedule=schedule,
        after=parts.after(),
    )


def build_stream(config: Config, context: ParallelContext, parts: Parts) -> MoEStream:
    moe = config.moe
    gate = {"renormalise": moe.renormalise, "noisy": moe.noisy, "balanced": moe.balanced_routing}
    router = Router(parts.dim, moe.num_experts, moe.top_k, **gate)
    local = context.local_experts(moe.num_experts)
    experts = Experts(parts.dim, parts.ffn_dim, moe.num_experts, local, parts.activation)
    dispatcher = context.dispatcher(moe.num_experts, moe.dropless_ceiling)
    if config.strategy.wire_dtype is not None and context.ep_size > 1:
        dispatcher = Narrowed(dispatcher, getattr(torch, config.strategy.wire_dtype))
    return MoEStream(router, experts, dispatcher, moe.capacity_factor, config.schedule.chunks or 1)


ARCHITECTURES: dict[str, Callable[[Config, ParallelContext, Parts, Sequence[nn.Module], bool], nn.Module]] = {
    "top_k": top_k_block,
    "shared_expert": shared_expert_block,
    "scmoe": shortcut_block,
    "dgmoe": double_gate_block,
    "dgmoe_share": double_gate_block,
}


# ---------------------------------------------------------------------- families


def build_gpt(config: Config, context: ParallelContext) -> GPT:
    blocks = build_blocks(config, context)
    return GPT(config.data.vocab_size, config.data.seq_len, config.model.dim, blocks, config.model.dropout)


def build_llama(config: Config, context: ParallelContext) -> Llama:
    blocks = build_blocks(config, context)
    return Llama(config.data.vocab_size, config.data.seq_len, config.model.dim, blocks, config.model.dropout)


def build_swin(config: Config, context: ParallelContext) -> Any:
    """SwinV2-MoE (Table 9): the architecture under study in stage 3; in stage 4 standard top-2 stays."""
    if find_spec("timm") is None:
        raise ConfigError("model.family is 'swin', which needs timm: pip install 'scmoe[vision]'")
    from scmoe.models.swin import PostNorm, ShiftedWindows, Swin

    model, data, moe = config.model, config.data, config.moe
    depths = (2, 2, model.layers, 2)

    def parts(stage: int, i: int) -> Parts:
        dim, heads = model.dim * 2**stage, model.heads * 2**stage
        grid = data.image_size // model.patch_size // 2**stage
        drop_path = model.drop_path * (sum(depths[:stage]) + i) / (sum(depths) - 1)
        return Parts(
            dim,
            4 * dim,
            norm=nn.Identity,  # it comes after
            mlp=lambda: MLP(dim, 4 * dim),
            attention=lambda: ShiftedWindows(dim, heads, grid, model.window, shifted=i % 2 == 1),
            after=lambda: PostNorm(dim, drop_path),
        )

    dense = replace(config, moe=replace(moe, architecture="dense"))
    top_2 = replace(config, moe=replace(moe, architecture="top_k", top_k=min(2, moe.num_experts)))
    configs = (dense, dense, config, dense if moe.architecture == "dense" else top_2)
    stages = [
        stack(configs[stage], context, [parts(stage, i) for i in range(depth)]) for stage, depth in enumerate(depths)
    ]
    return Swin(data.image_size, model.patch_size, model.dim, data.num_classes, stages)


FAMILIES: dict[str, Callable[[Config, ParallelContext], Any]] = {
    "gpt": build_gpt,
    "llama": build_llama,
    "swin": build_swin,
}
