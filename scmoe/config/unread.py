"""Refuses a value that nothing would read: such a field must have its default.

Each topic yields why nothing reads some fields, and their keys.
"""

from collections.abc import Iterator

from scmoe.config.derived import SHORTCUT_SCHEDULES, resolve_ep_size
from scmoe.config.fields import Config
from scmoe.config.halved_batches import two_batches_unread
from scmoe.config.leaves import flatten, leaves, plain
from scmoe.config.model_fields import LatentConfig
from scmoe.config.refuse import Refusals
from scmoe.config.registry import ARCHITECTURES, DATASETS, FAMILIES, IMAGES

# Fields that have no meaning for images. In swin, MLPs have 4 x the stage's dim, drop_path replaces
# dropout, no norm before a sub-layer could be shared, and there is one after the MoE module anyway.
NOT_FOR_IMAGES = (
    "model.ffn_dim",
    "model.kv_heads",
    "model.head_dim",
    "model.activation",
    "model.dropout",
    "moe.tap_norm",
    "moe.after_norm",
    "moe.ffn_dim",
    "moe.leading_dense",
    "data.tokenizer",
    "data.vocab_size",
    "data.seq_len",
    "data.cache_dir",
    "trainer.max_tokens",
)
# Fields that have a meaning for images only.
ONLY_FOR_IMAGES = (
    "model.patch_size",
    "model.window",
    "model.drop_path",
    "data.image_size",
    "data.num_classes",
    "data.augment",
    "data.mixup",
    "data.cutmix",
    "data.label_smoothing",
)
OF_GATES = ("offload.way", "analysis.gating_every", "analysis.record_routing")
BY_DEPTH = ("analysis.similarity_every", "analysis.gradients_every")
OF_EXPERTS = (
    "moe.dropless_ceiling",
    "moe.rows",
    "schedule.slot",
    "schedule.auto",
    *OF_GATES,
    "moe.after_norm",
    "moe.ffn_dim",
    "moe.leading_dense",
    "moe.router",
    "moe.router_scale",
    "moe.bias_rate",
    "moe.zero_experts",
    "schedule.inside_attention",
)
OWN_WEIGHTS = ("deepseek", "longcat")  # routers whose weights do not depend on moe.renormalise
OF_LATENTS = tuple(leaf.key for leaf in leaves(LatentConfig(), "model.latent."))
OF_LLAMA = ("model.attention", "model.norm_eps", "model.rope_theta")
# Why nothing reads some fields, and their keys.
Unread = Iterator[tuple[str, tuple[str, ...]]]


def unread_fields(config: Config) -> Refusals:
    """Refuse a value that nothing would read: such a field must have its default.

    Only the extension knows which fields its architecture, model or data set reads.
    """
    values = flatten(config)
    defaults = flatten(Config())
    topics = (
        _unread_of_wiring,
        _unread_of_model,
        _unread_of_routing,
        _unread_of_schedule,
        _unread_of_data,
        _unread_of_training,
    )
    for topic in topics:
        for why, keys in topic(config):
            for key in keys:
                if values[key] != defaults[key]:
                    yield key, f"{plain(defaults[key])}, as {why}"


def _unread_of_wiring(config: Config) -> Unread:
    """Yield what the architecture does not have: experts, a tap, a shared expert."""
    moe = config.moe
    wiring = f"moe.architecture={moe.architecture}"
    extension = moe.architecture not in ARCHITECTURES.built_in
    no_tap = not extension and moe.architecture not in SHORTCUT_SCHEDULES
    if moe.architecture == "dense":
        yield f"{wiring} has no experts", OF_EXPERTS
    if extension:
        yield f"{wiring} is an extension's, which the planner cannot price", ("schedule.auto",)
        yield f"{wiring} is an extension's, whose gates are not known", OF_GATES
        yield f"{wiring} is an extension's, whose taps are not known", BY_DEPTH
    if no_tap:
        yield f"{wiring} has no tap", ("moe.first_position", "moe.tap_norm")
    if no_tap and config.analysis.gating_every is None:  # Fig. 9 measures at the position
        yield f"{wiring} has no tap", ("moe.position",)
    if not extension and moe.architecture != "scmoe":
        yield f"{wiring} reads no tap there", ("moe.coefficient_input",)
    if not extension and SHORTCUT_SCHEDULES.get(moe.architecture) != "dgmoe":
        yield f"{wiring} has one gate", ("moe.distinct_experts",)
    if moe.combine == "direct_add":
        yield "moe.combine=direct_add has no coefficients", ("moe.coefficient_input",)
    if not extension and moe.architecture not in ("shared_expert", "scmoe", "farskip"):
        yield f"{wiring} has no shared expert to combine with", ("moe.combine",)
    if moe.architecture == "farskip":
        one_by_one = ("moe.combine", "moe.after_norm")
        yield f"{wiring} adds shared and routed output one after the other", one_by_one
        yield f"the experts of {wiring} read one representation", ("analysis.gating_every",)
    swin = config.model.family == "swin"  # its stage 4 has no tap
    if moe.every == 1 and moe.position != "pos1" and (no_tap or swin):
        gating = ("analysis.gating_every",)
        yield "with moe.every=1 a block without a tap needs moe.position=pos1", gating


def _unread_of_model(config: Config) -> Unread:
    model = config.model
    if model.attention == "latent":
        yield "model.attention=latent has one latent for all heads", ("model.kv_heads",)
        yield "model.attention=latent has its sizes in model.latent", ("model.head_dim",)
    else:
        yield "only model.attention=latent has latents", OF_LATENTS
    if model.family in FAMILIES.built_in and model.family != "llama":
        yield f"model.family={model.family} fixes it", OF_LLAMA


def _unread_of_routing(config: Config) -> Unread:
    moe = config.moe
    if moe.capacity_factor is not None:
        yield "only moe.capacity_factor=null is dropless", ("moe.dropless_ceiling",)
    if moe.rows != "buffers":
        yield "only moe.rows=buffers has buffers", ("moe.overflow",)
    # stage 4 of swin keeps two experts, whatever stage 3 keeps
    has_stage_4 = config.model.family == "swin" and moe.architecture != "dense"
    if moe.top_k == 1 and not (has_stage_4 and moe.num_experts > 1):
        yield "moe.top_k=1 always keeps the raw probability", ("moe.renormalise",)
    if moe.router in OWN_WEIGHTS:
        yield f"moe.router={moe.router} fixes it", ("moe.renormalise",)
    if moe.balanced_routing:
        yield "moe.balanced_routing=true ignores the gate's choice", ("moe.bias_rate",)
        yield "moe.balanced_routing=true deals to other experts only", ("moe.zero_experts",)
    if moe.num_experts == 1:
        yield "the gate has no choice with moe.num_experts=1", ("analysis.gating_every",)


def _unread_of_schedule(config: Config) -> Unread:
    inside = ("schedule.inside_attention",)
    if config.moe.architecture == "dgmoe_share":
        yield "two pairs share one MoE module", ("schedule.auto", "strategy.dense")
    if config.schedule.auto:
        yield "schedule.auto=true chooses it", ("schedule.slot", "schedule.inside_attention")
        yield "schedule.auto=true hides transfers", ("schedule.transfers",)
    if resolve_ep_size(config) == 1:
        no_rows = "no rows travel where every rank has all experts (strategy.ep_size)"
        yield no_rows, ("schedule.transfers",)
    if config.trainer.compile:
        yield "trainer.compile=true makes one graph of attention", inside
    if config.model.family == "swin":
        yield "model.family=swin has an attention that is one operator", inside
    yield from two_batches_unread(config)


def _unread_of_data(config: Config) -> Unread:
    data = config.data
    family = config.model.family
    name = f"data.name={data.name}"
    images = data.name in IMAGES
    if data.name in ("sotu", "synthetic", "digits"):
        yield f"{name} reads no path", ("data.path",)
    if data.name != "hf":
        yield f"{name} has no subsets", ("data.subset",)
        yield f"{name} has no fields", ("data.text_field",)
    if data.name in DATASETS.built_in and data.name not in ("text", "image_folder"):
        yield f"{name} has no files that could be left out", ("data.on_error",)
    # If data and model do not fit together, data.name is refused.
    if family in FAMILIES.built_in and images == (family in FAMILIES.images):
        if images:
            yield f"{name} has images", NOT_FOR_IMAGES
        else:
            yield f"{name} has no images", ONLY_FOR_IMAGES


def _unread_of_training(config: Config) -> Unread:
    """Yield what the model, the optimizer, the ranks and offloading do not read."""
    trainer = config.trainer
    family = config.model.family
    if family not in ("gpt", "llama"):
        yield f"model.family={family} reads no checkpoint", ("init_from",)
    if config.optim.name == "adamw":
        yield "optim.name=adamw has optim.beta1", ("optim.momentum",)
    schedule = f"optim.schedule={config.optim.schedule}"
    if config.optim.schedule != "wsd":
        yield f"{schedule} has no phase of decay", ("optim.decay_steps",)
    if config.optim.schedule == "constant":
        yield f"{schedule} never falls", ("optim.min_lr_ratio",)
    if config.optim.name == "muon":
        yield "optim.name=muon updates whole matrices", ("strategy.dense",)
    if trainer.limit_val_batches == 0:
        yield "trainer.limit_val_batches=0 validates nothing", ("trainer.early_stopping",)
    if trainer.compile:  # hooks that are added later to a compiled block do not run
        probes = ("analysis.gating_every", *BY_DEPTH)
        yield "trainer.compile=true runs no hooks", probes
    if config.offload.way == "resident":
        yield "offload.way=resident fetches none", ("offload.slots", "offload.rate_mb_s")
    if trainer.precision != "32-true":
        yield "only experts of trainer.precision=32-true are fetched", ("offload.way",)
    if trainer.devices * trainer.num_nodes > 1:
        yield "each of several ranks holds experts of its own", ("offload.way",)
