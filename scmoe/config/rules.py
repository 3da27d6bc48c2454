"""Checks a configuration: the range of each number, and combinations that cannot run.

An error is raised before a process starts or a file is written, in one line that names the key. Not checked here: what
depends on the machine (does it have the GPUs, does the data exist); that is checked where it is used.
"""

import inspect
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, Rule, flatten, in_range, leaves, show
from scmoe.config.registry import ARCHITECTURES, CALLBACKS, DATASETS, FAMILIES, IMAGES, TEXTS
from scmoe.schedule.schedule import Schedule

# Architectures with a tap, and the architecture of their schedules.
ACTIVATIONS = {"gpt": "gelu", "llama": "swiglu"}  # what model.activation: null means
SHORTCUTS = {"scmoe": "scmoe", "dgmoe": "dgmoe", "dgmoe_share": "dgmoe"}

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # file systems take 255 bytes
STEPS = re.compile(r"(\d{1,10}):(\d{1,10})")  # of trainer.profile_steps
INIT_FROM = re.compile(r"(hf|scmoe):.+")

# Arguments of Lightning's Trainer that trainer.extra must not hold, and what decides them.
OWN_ARGUMENTS = {
    **{name: f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "precision", "max_steps")},
    **{name: f"trainer.{name}" for name in ("deterministic", "overfit_batches", "fast_dev_run")},
    **{name: f"trainer.{name}" for name in ("limit_train_batches", "limit_val_batches")},
    **dict.fromkeys(("max_epochs", "min_epochs", "check_val_every_n_epoch"), "trainer.max_steps and trainer.val_every"),
    "val_check_interval": "trainer.val_every",
    "log_every_n_steps": "trainer.log_every",
    "accumulate_grad_batches": "trainer.accumulate",
    "gradient_clip_val": "trainer.gradient_clip",
    "gradient_clip_algorithm": "trainer.gradient_clip, which is a norm",
    "profiler": "trainer.profile_steps",
    "enable_checkpointing": "trainer.checkpoint_every and trainer.save_top_k",
    "enable_progress_bar": "trainer.progress",
    "default_root_dir": "runs_dir",
    "strategy": "the section strategy",
    "logger": "the section logger",
    "callbacks": "the sections callbacks, trainer and analysis",
    **dict.fromkeys(("use_distributed_sampler", "reload_dataloaders_every_n_epochs"), "the data module"),
    **dict.fromkeys(("plugins", "sync_batchnorm"), "the Strategy, which is ExpertParallelStrategy"),
    "enable_model_summary": "the table of parameters that a run prints",
    "num_sanity_val_steps": "the Strategy, which checks batches before the first one",
    "barebones": "trainer.progress, logger.mode and trainer.save_top_k",
}


SMALLEST_VOCABULARY = {"bpe": 257, "gpt2": 50257}  # bpe: all bytes and the end-of-text token
MOST_SYNTHETIC = 4096  # sequences of a validation
LEAST_IDS = 2  # with one, there is nothing to predict

# Fields that have no meaning for images, and fields that have a meaning for images only.
NOT_FOR_IMAGES = (
    # swin: MLPs have 4 x the stage's dim, drop_path replaces dropout, and no norm before a sub-layer could be shared
    *("model.ffn_dim", "model.kv_heads", "model.activation", "model.dropout", "moe.tap_norm"),
    *("data.tokenizer", "data.vocab_size", "data.seq_len", "data.cache_dir"),
)
ONLY_FOR_IMAGES = (
    *("model.patch_size", "model.window", "model.drop_path"),
    *("data.image_size", "data.num_classes", "data.augment", "data.mixup", "data.cutmix", "data.label_smoothing"),
)


def validate(config: Config, source: str = "config") -> None:
    """Raise ConfigError for the first value or combination that cannot run. source: where it is from."""
    values = flatten(config)
    checks = (_ranges, _extensions, _model, _moe, _schedule, _ranks, _offload, _data, _analysis, _trainer)
    for refused, key, allowed in chain.from_iterable(check(config) for check in checks):
        if refused:
            raise ConfigError(f"{source}: {key} is {show(values[key])}, allowed: {allowed}")


def resolve_ep_size(config: Config) -> int:
    """Return the number of expert-parallel ranks: as configured, else the most on a machine that divide the experts."""
    if config.strategy.ep_size is not None:
        return config.strategy.ep_size
    return 1 if config.moe.architecture == "dense" else math.gcd(config.moe.num_experts, config.trainer.devices)


def last_step(config: Config) -> int:
    """Return the number of optimizer steps after which a run ends."""
    trainer = config.trainer
    limit = trainer.limit_train_batches
    return trainer.max_steps if limit is None else min(trainer.max_steps, limit // trainer.accumulate)


def validates(config: Config) -> bool:
    """Return whether a run validates at all."""
    return config.trainer.limit_val_batches != 0


def shortened(config: Config) -> Config:
    """Return the configuration of the trial where fast_dev_run is set, otherwise the configuration as it is.

    One optimizer step and one batch of validation. The only logger is metrics.csv, and the only checkpoint is that of
    the end.
    """
    if not config.trainer.fast_dev_run:
        return config
    trainer = replace(config.trainer, max_steps=1, log_every=1, limit_train_batches=None, limit_val_batches=1)
    trainer = replace(trainer, save_top_k=0, early_stopping=None, profile_steps=None)
    return replace(config, trainer=trainer, logger=replace(config.logger, mode="disabled", tensorboard=False))


def _trainer(config: Config) -> Iterator[Rule]:
    trainer, last = config.trainer, last_step(config)
    cut = (trainer.limit_train_batches or 0) % trainer.accumulate
    yield cut, "trainer.limit_train_batches", f"null or a multiple of trainer.accumulate, {trainer.accumulate}"
    if trainer.early_stopping is not None:
        never = "null, as no validation takes place with"
        off = not validates(config)
        yield off, "trainer.early_stopping", f"{never} trainer.limit_val_batches=0"
        late = trainer.val_every > last
        yield late, "trainer.early_stopping", f"{never} trainer.val_every={trainer.val_every} in {last} steps"
    if trainer.profile_steps is not None:
        given = STEPS.fullmatch(trainer.profile_steps)
        good = given is not None and int(given[1]) < int(given[2]) <= last
        yield not good, "trainer.profile_steps", f"null or A:B with A < B <= {last}, the number of steps"
    unread = config.optim.name == "adamw" and config.optim.momentum != type(config.optim)().momentum
    yield unread, "optim.momentum", f"{type(config.optim)().momentum}, as optim.name=adamw has optim.beta1"
    for name in sorted(trainer.extra.keys() & OWN_ARGUMENTS.keys()):
        yield True, "trainer.extra", f"a mapping without {name}, which {OWN_ARGUMENTS[name]} decides"

    between = "max_time" in trainer.extra and trainer.accumulate > 1
    yield between, "trainer.extra", "max_time with trainer.accumulate=1, else it may end a run between a step's batches"


def _ranges(config: Config) -> Iterator[Rule]:
    for leaf in leaves(config):
        finite = not isinstance(leaf.value, float) or math.isfinite(leaf.value)
        inside = leaf.range is None or leaf.value is None or in_range(leaf.range, leaf.value)
        known = leaf.names is None or leaf.value in leaf.names()
        yield not (finite and inside and known), leaf.key, leaf.allowed


def _model(config: Config) -> Iterator[Rule]:
    model, weights = config.model, config.init_from
    name = "letters, digits, '.', '_' and '-', a letter or digit first, at most 100 in all"
    yield not NAME.fullmatch(config.name), "name", name  # it becomes a folder in runs_dir and must not lead out of it
    yield model.dim % model.heads, "model.dim", f"a multiple of model.heads, {model.heads}"
    kv_heads = model.kv_heads or model.heads
    yield model.heads % kv_heads, "model.kv_heads", f"null or a divisor of model.heads, {model.heads}"
    odd = model.family == "llama" and model.dim // model.heads % 2
    yield odd, "model.heads", f"a divisor of model.dim, {model.dim}, with an even quotient for rotary embedding"
    yield weights is not None and not INIT_FROM.fullmatch(weights), "init_from", "null, hf:FOLDER or scmoe:FILE"
    newest = os.path.abspath(Path(config.runs_dir) / "latest") + os.sep
    paths = {"init_from": (weights or "").partition(":")[2], "data.tokenizer": config.data.tokenizer}
    for key, path in paths.items():
        in_newest = os.path.abspath(path).startswith(newest)
        yield in_newest, key, f"another path: {config.runs_dir}/latest will be the directory of this run"
    unread = weights is not None and model.family not in ("gpt", "llama")
    yield unread, "init_from", f"null, as model.family={model.family} reads no checkpoint"


def _moe(config: Config) -> Iterator[Rule]:
    moe, layers, chosen = config.moe, config.model.layers, f"as moe.architecture={config.moe.architecture}"
    dense = moe.architecture == "dense"
    tapped = moe.architecture in SHORTCUTS
    double = moe.architecture in ("dgmoe", "dgmoe_share")
    own = moe.architecture not in ARCHITECTURES.built_in  # an extension's: which of these fields it reads is its own
    capped = moe.dropless_ceiling is not None and (dense or moe.capacity_factor is not None)
    yield capped, "moe.dropless_ceiling", "null, unless there are experts and moe.capacity_factor=null"
    buffers, dropless = moe.rows == "buffers", moe.capacity_factor is None
    yield dense and moe.rows != "auto", "moe.rows", f"auto, {chosen} has no experts"
    yield dropless and moe.rows == "slots", "moe.rows", "auto | filled | buffers where moe.capacity_factor=null"
    unlimited = not dropless or moe.dropless_ceiling is None
    finite = "auto | filled | slots, unless moe.capacity_factor=null and moe.dropless_ceiling is set"
    yield buffers and unlimited, "moe.rows", finite
    yield not buffers and moe.overflow != "drop", "moe.overflow", "drop, unless moe.rows=buffers"
    no_tap = not tapped and not own
    yield no_tap and moe.first_position is not None, "moe.first_position", f"null, {chosen} has no shortcut"
    yield no_tap and moe.tap_norm != "own", "moe.tap_norm", f"own, {chosen} has no tap"
    reads_tap = moe.coefficient_input != "current"
    yield (
        reads_tap and not own and moe.architecture != "scmoe",
        "moe.coefficient_input",
        f"current, {chosen} has no tap",
    )
    why = "current, as moe.combine=direct_add has no coefficients"
    yield reads_tap and moe.combine == "direct_add", "moe.coefficient_input", why
    alone = not own and moe.architecture not in ("shared_expert", "scmoe")
    yield alone and moe.combine != "cg1", "moe.combine", f"cg1, {chosen} has no shared expert to combine with"
    raw = moe.top_k == 1 and not moe.renormalise
    yield raw, "moe.renormalise", "true, as moe.top_k=1 always keeps the raw probability"
    if dense:
        return
    model, unit = config.model, 2 if config.model.family == "swin" else 8  # stages 3 and 4 are 4 and 8 times as wide
    yield model.dim % unit, "model.dim", f"a multiple of {unit}: products of experts need rows aligned to 16 bytes"
    yield (model.ffn_dim or 8) % 8, "model.ffn_dim", "null or a multiple of 8, as with model.dim"
    yield moe.top_k > moe.num_experts, "moe.top_k", f"at most moe.num_experts, {moe.num_experts}"
    yield layers % moe.every, "model.layers", f"a multiple of moe.every, {moe.every}"
    gates = f"1, as each of the two gates of moe.architecture={moe.architecture} chooses one expert"
    yield double and moe.top_k != 1, "moe.top_k", gates
    yield double and moe.num_experts < 2, "moe.num_experts", f"2 or more, {chosen} gives each token two experts"
    short = moe.architecture == "dgmoe_share" and layers < 2 * moe.every
    yield short, "model.layers", f"{2 * moe.every} or more, {chosen} shares one MoE module"
    # With MoE in every block there is no Block-MLP, so the tap is the block's own input.
    own_input = tapped and moe.every == 1
    yield own_input and moe.position != "pos1", "moe.position", "pos1 where moe.every=1"
    other = moe.first_position not in (None, "pos1")
    yield own_input and other, "moe.first_position", "pos1 | null where moe.every=1"


def _schedule(config: Config) -> Iterator[Rule]:
    moe, schedule, chosen = config.moe, config.schedule, f"moe.architecture={config.moe.architecture}"
    if moe.architecture == "dense":
        yield schedule.slot is not None, "schedule.slot", f"null, as {chosen} has no experts"
        yield schedule.auto, "schedule.auto", f"false, as {chosen} has no MoE stream"
        yield schedule.chunks not in (None, 1), "schedule.chunks", f"1 or null, as {chosen} has no MoE stream"
    elif schedule.auto:
        yield schedule.slot is not None, "schedule.slot", "null, as schedule.auto=true chooses it"
        shared = moe.architecture == "dgmoe_share"
        yield shared, "schedule.auto", f"false where {chosen}, as two pairs share one MoE module"
    elif schedule.slot is not None and moe.architecture in ARCHITECTURES.built_in:
        positions = (moe.position, moe.first_position or moe.position) if moe.architecture in SHORTCUTS else (None,)
        for position in positions:
            each = Schedule(SHORTCUTS.get(moe.architecture, moe.architecture), position)
            last = len(each.window)
            yield schedule.slot > last, "schedule.slot", f"0 to {last} for {each.name}"


def _ranks(config: Config) -> Iterator[Rule]:
    moe, ep_size, trainer = config.moe, config.strategy.ep_size or 1, config.trainer
    dense, world = moe.architecture == "dense", trainer.devices * trainer.num_nodes
    yield dense and ep_size > 1, "strategy.ep_size", "1 or null, as moe.architecture=dense has no experts"
    uneven = not dense and moe.num_experts % ep_size
    yield uneven, "strategy.ep_size", f"a divisor of moe.num_experts, {moe.num_experts}"
    yield world % ep_size, "strategy.ep_size", f"a divisor of trainer.devices x trainer.num_nodes, {world}"
    whole_nodes = ep_size > trainer.devices > 1 and ep_size % trainer.devices == 0
    unless = "auto | flat, unless strategy.ep_size is 2, 3, ... times trainer.devices, which is 2 or more"
    yield config.strategy.exchange == "hierarchical" and not whole_nodes, "strategy.exchange", unless
    nodes = trainer.num_nodes > 1 and trainer.devices > 1
    hybrid = "replicated | sharded | auto, unless trainer.num_nodes and trainer.devices are 2 or more"
    yield config.strategy.dense == "hybrid" and not nodes, "strategy.dense", hybrid
    dim, holders = config.model.dim, world // resolve_ep_size(config)
    swin = config.model.family == "swin"  # its MoEs are in the stages 3 and 4
    widths = (4 * dim, 8 * dim) if swin else (dim, config.model.ffn_dim or 4 * dim)
    if not dense and config.strategy.dense in ("sharded", "hybrid"):
        odd = " and ".join(str(width) for width in widths if width % holders)
        why = f"as a width of {odd} is no multiple of the {holders} ranks that hold the same experts"
        yield odd != "", "strategy.dense", f"replicated, {why}; or raise strategy.ep_size"
    muon = config.optim.name == "muon" and config.strategy.dense != "replicated"
    yield muon, "strategy.dense", "replicated, with optim.name=muon, whose updates need whole matrices"
    paced = config.strategy.dense != "replicated" and config.strategy.reductions is not None
    yield paced, "strategy.reductions", "null, unless strategy.dense=replicated, whose gradients DDP sums"
    parts, batches = "trainer.devices x trainer.num_nodes x trainer.accumulate", world * trainer.accumulate
    yield config.data.global_batch_size % batches, "data.global_batch_size", f"a multiple of {parts}, {batches}"
    no_rows = config.strategy.wire_dtype is not None and resolve_ep_size(config) == 1
    yield no_rows, "strategy.wire_dtype", "null, as no rows travel where every rank has all experts (strategy.ep_size)"


def _offload(config: Config) -> Iterator[Rule]:
    offload, dense = config.offload, config.moe.architecture == "dense"
    resident = offload.way == "resident"
    yield dense and not resident, "offload.way", "resident, as moe.architecture=dense has no experts"
    yield resident and offload.slots is not None, "offload.slots", "null, as offload.way=resident keeps all experts"
    yield resident and offload.rate_mb_s is not None, "offload.rate_mb_s", "null, as offload.way=resident fetches none"
    guessing = offload.way == "speculative"
    least, why = config.moe.top_k * (1 + guessing), "a token's experts of a layer" + guessing * " and as many guesses"
    few = not resident and offload.slots is not None and offload.slots < least
    yield few, "offload.slots", f"null, or {least} or more: {why}"
    other = config.trainer.precision != "32-true"
    yield not resident and other, "offload.way", "resident, unless trainer.precision=32-true"
    alone = config.trainer.devices * config.trainer.num_nodes == 1
    yield not resident and not alone, "offload.way", "resident on several ranks, as each holds experts of its own"


def _analysis(config: Config) -> Iterator[Rule]:
    analysis = config.analysis
    gating, similarity = analysis.gating_every is not None, analysis.similarity_every is not None
    dense, compiled = config.moe.architecture == "dense", config.trainer.compile
    yield dense and gating, "analysis.gating_every", "null, as moe.architecture=dense has no gate"
    alone = not dense and config.moe.num_experts == 1
    yield alone and gating, "analysis.gating_every", "null, as the gate has no choice with moe.num_experts=1"
    no_hooks = "null, as trainer.compile=true runs no hooks"  # those that are added later to a compiled block
    yield compiled and gating, "analysis.gating_every", no_hooks
    yield compiled and similarity, "analysis.similarity_every", no_hooks


def _data(config: Config) -> Iterator[Rule]:
    """Check paths and vocabularies, and whether data and model fit together."""
    data, read, named = config.data, config.data.path is not None, f"as data.name={config.data.name}"
    yield data.name in ("text", "hf", "image_folder") and not read, "data.path", f"a path, {named} reads from it"
    yield data.name in ("sotu", "synthetic", "digits") and read, "data.path", f"null, {named} reads no path"
    yield data.name != "hf" and data.subset is not None, "data.subset", f"null, {named} has no subsets"
    endless = data.name == "synthetic" and (data.val_sequences or 0) > MOST_SYNTHETIC
    yield endless, "data.val_sequences", f"null or at most {MOST_SYNTHETIC}, {named} has no end"
    no_files = data.name in DATASETS.built_in and data.name not in ("text", "image_folder")
    yield data.on_error == "skip" and no_files, "data.on_error", f"raise, {named} has no files that could be left out"
    smallest = SMALLEST_VOCABULARY.get(data.tokenizer, LEAST_IDS)
    small = data.name in TEXTS and data.vocab_size < smallest
    yield small, "data.vocab_size", f"{smallest} or more for data.tokenizer={data.tokenizer}"
    yield data.vocab_size < LEAST_IDS, "data.vocab_size", f"{LEAST_IDS} or more"
    yield from _images(config)


def _images(config: Config) -> Iterator[Rule]:
    """Check that model and data fit together, and that fields without a meaning for them have their defaults."""
    model, data, images = config.model, config.data, config.data.name in IMAGES
    wanted = model.family in FAMILIES.images
    names = f"{'' if wanted else 'anything but '}{', '.join(IMAGES)}"
    yield wanted != images, "data.name", f"{names} for model.family={model.family}"
    if model.family not in FAMILIES.built_in:  # an extension's: which of these fields it reads is its own
        return
    values, defaults = flatten(config), flatten(type(config)())
    for key in NOT_FOR_IMAGES if images else ONLY_FOR_IMAGES:
        allowed = f"{show(defaults[key])}, as data.name={data.name} has {'' if images else 'no '}images"
        yield values[key] != defaults[key], key, allowed
    if not images:
        return
    step = 8 * model.patch_size  # three stages halve the feature map
    yield data.image_size % step, "data.image_size", f"a multiple of 8 x model.patch_size, {step}"
    widths = [data.image_size // model.patch_size // 2**stage for stage in range(4)]
    cut = any(width > model.window and width % model.window for width in widths)
    yield cut, "model.window", f"a divisor of the width of each larger feature map: {', '.join(map(str, widths))}"
    pairs = 2 * config.trainer.devices * config.trainer.num_nodes * config.trainer.accumulate
    odd = (data.mixup or data.cutmix) and data.global_batch_size % pairs
    yield odd, "data.global_batch_size", f"a multiple of {pairs}, as mixup and cutmix need pairs in every rank's batch"


def _extensions(config: Config) -> Iterator[Rule]:
    """Check what comes from extensions, after they are imported.

    Which fields an extension's architecture, model, data set or optimizer reads is its own. What measures or moves the
    parts of scmoe's own architectures is refused with another one.
    """
    names = CALLBACKS.names()
    known = " | ".join(names) or "{}, as no callback is registered; name its module in extensions"
    for name, options in config.callbacks.items():
        yield name not in names, "callbacks", known
        yield not isinstance(options, dict), "callbacks", f"options of {name} by name, or {{}}"
        try:
            inspect.signature(CALLBACKS[name]).bind(**options)
        except TypeError as error:
            yield True, "callbacks", f"options that {name} has: {error}"
    yield config.options and not config.extensions, "options", "{}, as only extensions read it"
    if config.moe.architecture in ARCHITECTURES.built_in:
        return
    analysis, why = config.analysis, f"as moe.architecture={config.moe.architecture} is an extension's"
    yield config.schedule.auto, "schedule.auto", f"false, {why}, which the planner cannot price"
    yield config.offload.way != "resident", "offload.way", f"resident, {why}, whose gates are not known"
    yield analysis.gating_every is not None, "analysis.gating_every", f"null, {why}, whose gates are not known"
    yield analysis.similarity_every is not None, "analysis.similarity_every", f"null, {why}, whose taps are not known"
