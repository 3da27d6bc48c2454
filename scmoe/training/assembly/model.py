"""Builds the network, the LightningModule and the optimizer of a configuration.

A family is a function (config, wire) -> network, registered by its name, that puts its model
around blocks (blocks.py). An optimizer is a function (config, parameters that are trained) ->
optimizer. Clipping and the schedule of the learning rate are the LightningModule's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from scmoe.blocks.build import Parts
from scmoe.blocks.sublayers import MLP, recompute_activations
from scmoe.config.derived import max_steps
from scmoe.config.fields import Config
from scmoe.config.installation import require
from scmoe.config.leaves import ConfigError, show
from scmoe.config.registry import FAMILIES, IMAGES, OPTIMIZERS, import_extensions
from scmoe.models.decoder import GPT, Llama
from scmoe.models.run_as import halves_of, run_as, schedule_of
from scmoe.moe.experts import Experts
from scmoe.parallel.dense.sharded import materialise, put, shard
from scmoe.parallel.wire.wire import Wire
from scmoe.training.assembly.blocks import build_blocks, stack
from scmoe.training.modules import ImageClassifier, LanguageModel, MoEModule
from scmoe.training.muon import MuonAndAdamW, Trained, adamw

if TYPE_CHECKING:
    from scmoe.weights.pretrained import Checkpoint

register_family = FAMILIES.register
register_optimizer = OPTIMIZERS.register
OF_A_NETWORK = ("blocks", "steps", "norm", "head", "init_weights", "rows_per_sample")


def build_model(config: Config, wire: Wire | None = None) -> Any:
    """Return the network with this rank's experts and weights drawn from the seed.

    If `wire.mesh` splits dense weights over ranks, no rank ever holds the whole model: it is split
    on the meta device, then one weight is drawn after the other. wire: None: all experts.
    """
    wire = wire or Wire()
    if wire.mesh.dense_mesh is not None:
        device = torch.get_default_device()  # the rank's: Lightning sets it while a model is built
        with torch.device("meta"):
            model = build_network(config, wire)
        shard(model, wire.mesh, config.trainer.precision)
        materialise(model, device)
        model.init_weights(config.seed, put)
    else:
        model = build_network(config, wire)
        model.init_weights(config.seed)
    if config.trainer.recompute:
        recompute_activations(model)
    return model


def build_model_to_train(config: Config, wire: Wire | None = None) -> Any:
    """Return the network at the start of a training, with weights drawn from the seed or read from
    init_from. wire: None: all experts.

    ConfigError: init_from cannot be read, or holds the weights of another model.
    """
    model = build_model(config, wire)
    if config.init_from is not None:
        from scmoe.weights.upcycle import fill

        fill(model, initial_weights(config, model), put)
    return model


def initial_weights(config: Config, model: Any) -> "Checkpoint":
    """Return what init_from names; of its weights only names and shapes are read.

    model: may be on the meta device. ConfigError: init_from cannot be read, or holds the weights of
    another model.
    """
    from scmoe.weights.pretrained import check_settings, read_export, read_hf, resolved_settings
    from scmoe.weights.upcycle import weight_sources

    kind, _, path = (config.init_from or "").partition(":")
    try:
        checkpoint = read_hf(Path(path)) if kind == "hf" else read_export(Path(path))
        check_settings(resolved_settings(config), checkpoint.settings)
        weight_sources(model, checkpoint)
    except ValueError as error:
        raise ConfigError(f"init_from is {show(config.init_from)}: {error}") from error
    return checkpoint


def build_model_on_meta(config: Config) -> Any:
    """Return the whole network without memory for its weights, to count parameters."""
    with torch.device("meta"):
        return build_network(config, Wire())


def build_network(config: Config, wire: Wire) -> Any:
    """Return the network with weights that are not set yet. ConfigError: an extension's network
    lacks what a network must have."""
    import_extensions(config.extensions)  # a spawned rank has not read the configuration
    network = FAMILIES[config.model.family](config, wire)
    if missing := [name for name in OF_A_NETWORK if getattr(network, name, None) is None]:
        lacks = (
            f"whose network lacks {', '.join(missing)}; scmoe.models.decoder.Decoder has all that a"
            " network needs"
        )
        raise ConfigError(f"model.family is {show(config.model.family)}, {lacks}")
    if config.schedule.batches_in_flight == 2:
        if not halves_of(network):  # also where it is built to be checked before ranks start
            raise ConfigError(
                f"schedule.batches_in_flight is 2, allowed for model.family={config.model.family}:"
                " 1, as its network has no Halves; scmoe.models.decoder.Decoder has it"
            )
        if wire.mesh.ep_size > 1:
            run_as(network, replace(schedule_of(network), batches_in_flight=2))
    return network


@register_family("gpt")
@register_family("llama")
def build_decoder(config: Config, wire: Wire) -> Any:
    model = config.model
    blocks = build_blocks(config, wire)
    decoder: Callable[..., Any] = GPT
    if model.family == "llama":
        decoder = partial(Llama, norm_eps=model.norm_eps)
    return decoder(config.data.vocab_size, config.data.seq_len, model.dim, blocks, model.dropout)


@register_family("swin", images=True)
def build_swin(config: Config, wire: Wire) -> Any:
    """Return SwinV2-MoE (Table 9): stage 3 has the configured architecture, stage 4 top-2."""
    require("model.family swin", "timm")
    from scmoe.models.swin import PostNorm, ShiftedWindows, Swin

    model = config.model
    data = config.data
    moe = config.moe
    depths = (2, 2, model.layers, 2)

    def parts(stage: int, i: int) -> Parts:
        dim, heads = model.dim * 2**stage, model.heads * 2**stage
        grid = data.image_size // model.patch_size // 2**stage
        drop_path = model.drop_path * (sum(depths[:stage]) + i) / (sum(depths) - 1)
        return Parts(
            dim,
            norm=nn.Identity,  # SwinV2 normalises after the sub-layer
            mlp=lambda: MLP(dim, 4 * dim),
            attention=lambda: ShiftedWindows(dim, heads, grid, model.window, shifted=i % 2 == 1),
            after=lambda: PostNorm(dim, drop_path),
            experts=partial(Experts, dim, 4 * dim),
        )

    dense = replace(config, moe=replace(moe, architecture="dense"))
    top_2 = replace(
        config,
        moe=replace(moe, architecture="top_k", top_k=min(2, moe.num_experts)),
        schedule=replace(config.schedule, slot=None),  # it is that of stage 3
    )
    configs = (dense, dense, config, dense if moe.architecture == "dense" else top_2)
    stages = [
        stack(configs[stage], wire, [parts(stage, i) for i in range(depth)])
        for stage, depth in enumerate(depths)
    ]
    return Swin(data.image_size, model.patch_size, model.dim, data.num_classes, stages)


def build_module(config: Config) -> MoEModule:
    """Return the LightningModule. It builds its network when the ranks exist."""
    task: Callable[..., MoEModule] = LanguageModel
    if config.data.name in IMAGES:
        task = partial(ImageClassifier, num_classes=config.data.num_classes)
    return task(
        partial(build_model_to_train, config),  # not a lambda: spawned processes get it pickled
        max_steps=max_steps(config),
        min_lr_ratio=config.optim.min_lr_ratio,
        warmup_steps=config.optim.warmup_steps,
        lr_schedule=config.optim.schedule,
        decay_steps=config.optim.decay_steps,
        make_optimizer=partial(OPTIMIZERS[config.optim.name], config),
        gradient_clip=config.trainer.gradient_clip,
        load_balance_coef=config.moe.load_balance_coef,
        z_loss_coef=config.moe.z_loss_coef,
        refuse_overflow=config.moe.overflow == "refuse",
        compiled=config.trainer.compile,
    )


def updated_by_muon(config: Config, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model of this config that Muon updates; none with another
    optimizer."""
    if config.optim.name != "muon":
        return []
    module = build_module(config)
    module.model = model
    return module.trained().matrices


@register_optimizer("adamw")
def build_adamw(config: Config, parameters: Trained) -> Optimizer:
    optim = config.optim
    return adamw(
        parameters,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )


@register_optimizer("muon")
def build_muon(config: Config, parameters: Trained) -> Optimizer:
    optim = config.optim
    return MuonAndAdamW(
        parameters,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        momentum=optim.momentum,
    )
