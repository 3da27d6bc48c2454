"""Builds the router of a configuration: a router is a function (config) -> Scoring, registered by its name.

    softmax     the paper's: softmax, weights as moe.renormalise says; no selection bias unless moe.bias_rate gives one
    deepseek    DeepSeek-V3 and Instella-MoE: sigmoid, kept weights normalised, bias by sign, loss per sequence
    longcat     LongCat-Flash: softmax over experts and zero experts, raw weights, bias in proportion

Left out: DeepSeek-V3's groups of experts, of which a token keeps some. Instella has one group, LongCat-Flash none.
"""

from dataclasses import replace

import torch

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, show
from scmoe.config.registry import ROUTERS
from scmoe.moe.router import Router, round_robin
from scmoe.moe.scores import Scoring, by_sign, in_proportion

register_router = ROUTERS.register


@register_router("softmax")
def softmax(config: Config) -> Scoring:
    return Scoring(normalise=config.moe.renormalise, rule=None if config.moe.bias_rate is None else by_sign)


@register_router("deepseek")
def deepseek(config: Config) -> Scoring:
    return Scoring(torch.sigmoid, sums_to_one=False, rule=by_sign, rate=0.002, per_sequence=True)


@register_router("longcat")
def longcat(config: Config) -> Scoring:
    return Scoring(normalise=False, rule=in_proportion, rate=0.1)


def build_router(config: Config, dim: int) -> Router:
    """ConfigError: moe.bias_rate is set, but an extension's router has no rule."""
    moe = config.moe
    scoring = replace(ROUTERS[moe.router](config), scale=moe.router_scale)
    if moe.bias_rate is not None:
        if moe.bias_rate and scoring.rule is None:
            name = show(moe.router)
            raise ConfigError(f"moe.bias_rate is {moe.bias_rate}, allowed: null or 0, as moe.router={name} has no rule")
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
