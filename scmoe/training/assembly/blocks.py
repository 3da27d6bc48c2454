"""Builds the blocks of a configuration, and their routers.

An architecture wires the parts of any model family.

An architecture is a function (config, wire, parts of each layer) -> blocks, registered by its
name. A router is a function (config) -> Scoring:

    softmax     the paper's: softmax, weights as moe.renormalise says; no selection bias unless
                moe.bias_rate gives one
    deepseek    DeepSeek-V3 and Instella-MoE: sigmoid, kept weights normalised, bias by sign, loss
                per sequence
    longcat     LongCat-Flash: softmax over experts and zero experts, raw weights, bias in
                proportion

Left out: DeepSeek-V3's groups of experts, of which a token keeps some. Instella has one group,
LongCat-Flash none.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from scmoe.blocks.build import BLOCKS, Parts, wired_block
from scmoe.blocks.double_gate import DoubleGateBlock, share_moe
from scmoe.blocks.farskip import FarSkipBlock
from scmoe.blocks.latent import LatentAttention, LatentSizes
from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.rotary import Rotary
from scmoe.blocks.sublayers import MLP, Attention
from scmoe.config.derived import (
    FAMILY_ACTIVATIONS,
    resolve_ep_size,
    resolve_wiring,
    rows_are_filled,
)
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, show
from scmoe.config.registry import ARCHITECTURES, ROUTERS
from scmoe.moe.dispatcher import Blocking, Narrowed
from scmoe.moe.experts import Experts
from scmoe.moe.layout import Buffers, choose_rows
from scmoe.moe.router import DEEPSEEK, LONGCAT, Router, Scoring, by_sign, round_robin
from scmoe.moe.stream import MoEStream
from scmoe.parallel.wire.dispatchers import make_dispatcher
from scmoe.parallel.wire.wire import Wire
from scmoe.schedule.schedule import Schedule


def decoder_parts(
    config: Config,
    norm: Callable[[int], nn.Module],
    activation: str,
    bias: bool = True,
    rotary: Callable[[], Rotary | None] = lambda: None,
) -> Parts:
    """Return the parts of a decoder's blocks. activation: where model.activation is null."""
    model = config.model
    dim = model.dim
    ffn_dim = model.ffn_dim or 4 * dim
    activation = model.activation or activation

    def attention() -> nn.Module:
        if model.attention == "full":
            return Attention(
                dim,
                model.heads,
                bias=bias,
                kv_heads=model.kv_heads,
                rotary=rotary(),
                head_dim=model.head_dim,
            )
        latent = model.latent
        sizes = LatentSizes(
            latent.q_rank, latent.kv_rank, latent.nope_dim, latent.rope_dim, latent.value_dim
        )
        rotary_of_latents = Rotary(model.rope_theta, latent.yarn_factor)
        return LatentAttention(
            dim, model.heads, sizes, rotary_of_latents, latent.scaled, latent.gated
        )

    return Parts(
        dim,
        norm=lambda: norm(dim),
        mlp=lambda ffn_dim=ffn_dim: MLP(dim, ffn_dim, bias=bias, activation=activation),
        attention=attention,
        after=lambda: nn.Dropout(model.dropout) if model.dropout else nn.Identity(),
        experts=partial(Experts, dim, config.moe.ffn_dim or ffn_dim, activation=activation),
    )


def llama_parts(config: Config) -> Parts:
    model = config.model
    norm = partial(nn.RMSNorm, eps=model.norm_eps)
    rotary = partial(Rotary, model.rope_theta)
    return decoder_parts(config, norm, FAMILY_ACTIVATIONS["llama"], bias=False, rotary=rotary)


FAMILY_PARTS: dict[str, Callable[[Config], Parts]] = {
    "gpt": partial(decoder_parts, norm=nn.LayerNorm, activation=FAMILY_ACTIVATIONS["gpt"]),
    "llama": llama_parts,
}
register_architecture = ARCHITECTURES.register
register_router = ROUTERS.register


def build_blocks(config: Config, wire: Wire) -> list[nn.Module]:
    """Return the blocks of a model with equal layers."""
    return stack(config, wire, [FAMILY_PARTS[config.model.family](config)] * config.model.layers)


def stack(config: Config, wire: Wire, parts: Sequence[Parts]) -> list[nn.Module]:
    """Return the blocks of layers, given the parts of each."""
    return ARCHITECTURES[config.moe.architecture](config, wire, parts)


@register_architecture("dense")
def dense(config: Config, wire: Wire, parts: Sequence[Parts]) -> list[nn.Module]:
    return [layer.dense_block() for layer in parts]


def moe_blocks(
    block: type[MoEBlock], config: Config, wire: Wire, parts: Sequence[Parts]
) -> list[nn.Module]:
    """Return leading dense blocks, then blocks with an MoE each: one for each layer (every=1),
    pairs of Block-MLP and Block-MoE (every=2), or three Block-MLPs and a Block-MoE (every=4)."""
    every, widths = config.moe.every, config.moe.leading_dense
    dense = Parts.farskip_dense_block if issubclass(block, FarSkipBlock) else Parts.dense_block
    leading = [dense(layer, width) for layer, width in zip(parts, widths, strict=False)]
    starts = range(len(widths), len(parts), every)
    return leading + [
        moe_block(block, config, wire, parts[i : i + every], first=i == starts[0]) for i in starts
    ]


def register_moe_blocks(block: type[MoEBlock]) -> None:
    def blocks(config: Config, wire: Wire, parts: Sequence[Parts]) -> list[nn.Module]:
        return moe_blocks(block, config, wire, parts)

    blocks.__qualname__ = block.__qualname__  # an error about a name that is taken shows it
    register_architecture(block.architecture)(blocks)


for _block in BLOCKS.values():
    register_moe_blocks(_block)


@register_architecture("dgmoe_share")
def dgmoe_share(config: Config, wire: Wire, parts: Sequence[Parts]) -> list[nn.Module]:
    blocks = moe_blocks(DoubleGateBlock, config, wire, parts)
    share_moe([block for block in blocks if isinstance(block, MoEBlock)])
    return blocks


def moe_block(
    block: type[MoEBlock], config: Config, wire: Wire, layers: Sequence[Parts], first: bool
) -> nn.Module:
    """Return one block with an MoE.

    layers: the parts of its layer, of the two layers of a pair, or of four layers. first: the
    model's first MoE module, whose tap may be elsewhere.
    """
    wiring = resolve_wiring(config, block.architecture)
    first_tap, tap_of_others = wiring.taps
    settings = config.schedule
    schedule = Schedule(
        block.architecture,
        first_tap if first else tap_of_others,
        settings.slot,
        settings.chunks or 1,
        settings.inside_attention,
    )
    return wired_block(block, wiring, schedule, layers, partial(build_stream, config, wire))


def build_stream(config: Config, wire: Wire, parts: Parts) -> MoEStream:
    """Return the stream of one MoE module, with this rank's experts."""
    moe = config.moe
    router = build_router(config, parts.dim)
    experts = parts.experts(moe.num_experts, wire.mesh.local_experts(moe.num_experts))
    # One process builds the model of an estimate for many ranks.
    ep_size = max(wire.mesh.ep_size, resolve_ep_size(config))
    rows = choose_rows(moe.capacity_factor, rows_are_filled(config))
    if moe.rows == "buffers" and ep_size > 1:
        rows = Buffers(min(moe.dropless_ceiling or ep_size, ep_size))
    dispatcher = make_dispatcher(
        wire, moe.num_experts, moe.dropless_ceiling, isinstance(rows, Buffers)
    )
    if config.strategy.wire_dtype is not None and wire.mesh.ep_size > 1:
        dispatcher = Narrowed(dispatcher, getattr(torch, config.strategy.wire_dtype))
    if config.schedule.transfers == "sequential" and wire.mesh.ep_size > 1:
        dispatcher = Blocking(dispatcher)
    return MoEStream(router, experts, dispatcher, rows)


@register_router("softmax")
def softmax(config: Config) -> Scoring:
    return Scoring(
        normalise=config.moe.renormalise, rule=None if config.moe.bias_rate is None else by_sign
    )


@register_router("deepseek")
def deepseek(config: Config) -> Scoring:
    return DEEPSEEK


@register_router("longcat")
def longcat(config: Config) -> Scoring:
    return LONGCAT


def build_router(config: Config, dim: int) -> Router:
    """Return the router of one MoE module.

    ConfigError: moe.router of an extension returns no Scoring, or one that cannot be used; or
    moe.bias_rate is above 0 and the Scoring has no rule.
    """
    moe = config.moe
    scoring = scoring_of(config)
    if moe.bias_rate is not None:
        if moe.bias_rate and scoring.rule is None:
            name = show(moe.router)
            raise ConfigError(
                f"moe.bias_rate is {moe.bias_rate}, allowed: null or 0, as moe.router={name} has no"
                " rule"
            )
        scoring = replace(scoring, rate=moe.bias_rate)
    if moe.balanced_routing:  # the gate's choice is ignored, so nothing may be learned from it
        scoring = replace(scoring, rule=None)
    return Router(
        dim,
        moe.num_experts,
        moe.top_k,
        scoring=scoring,
        noisy=moe.noisy,
        deal=round_robin(moe.num_experts, moe.top_k) if moe.balanced_routing else None,
        zero_experts=moe.zero_experts,
    )


def scoring_of(config: Config) -> Scoring:
    """Return the values of moe.router, its scale times moe.router_scale. Errors are those of
    `build_router`."""
    moe = config.moe
    make = ROUTERS[moe.router]
    function = getattr(make, "__qualname__", type(make).__name__)
    named = f"moe.router is {show(moe.router)} ({make.__module__}.{function})"
    scoring = make(config)
    if not isinstance(scoring, Scoring):
        got = f"{type(scoring).__module__}.{type(scoring).__qualname__}"
        raise ConfigError(
            f"{named}, which returns {got}. It must return a Scoring of scmoe/moe/router.py."
        )
    try:
        scoring.check(moe.num_experts + moe.zero_experts)
    except ValueError as error:
        raise ConfigError(f"{named}: {error}") from error
    return replace(scoring, scale=scoring.scale * moe.router_scale)
