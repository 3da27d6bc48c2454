"""Checks a configuration: the range of each number, and combinations that cannot run.

A rule yields the key of a wrong value, with the values that are allowed or with advice. The error
is raised before a process starts or a file is written, in one line that names the key. What depends
on the machine, such as its GPUs and the data, is checked where it is used.
"""

import inspect
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from scmoe.config.derived import SHORTCUT_SCHEDULES, resolve_ep_size, resolve_wiring
from scmoe.config.fields import Config
from scmoe.config.halved_batches import two_batches, two_batches_in_training
from scmoe.config.leaves import leaves
from scmoe.config.refuse import Refusals, Remedy, refuse
from scmoe.config.registry import ARCHITECTURES, CALLBACKS, FAMILIES, IMAGES, TEXT_DATASETS
from scmoe.config.trainer_rules import length, trainer_rules
from scmoe.config.unread import unread_fields
from scmoe.schedule.schedule import Schedule

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # file systems take 255 bytes
INIT_FROM = re.compile(r"(hf|scmoe):.+")

SMALLEST_VOCABULARY = {"bpe": 257, "gpt2": 50257}  # bpe: all bytes and the end-of-text token
MOST_SYNTHETIC = 4096  # sequences of a validation
LEAST_IDS = 2  # with one, there is nothing to predict


def validate(config: Config, source: str, trains: bool = True) -> None:
    """Raise ConfigError for the first value or combination that cannot run.

    source: where it is from. trains: False where nothing is trained: skip the rules of a training's
    batches, such as two sequences for each rank with two batches in flight.
    """
    checks: list[Callable[[Config], Refusals]] = [
        _ranges,
        _extensions,
        unread_fields,
        _model,
        _moe,
        _schedule,
        _ranks,
        _offload,
        _data,
        length,
        trainer_rules,
    ]
    if trains:
        checks += [_shares_of_ranks, two_batches_in_training]
    refuse(config, *checks, prefix=f"{source}: ")


def _ranges(config: Config) -> Refusals:
    for leaf in leaves(config):
        finite = not isinstance(leaf.value, float) or math.isfinite(leaf.value)
        inside = leaf.range is None or leaf.value is None or leaf.range.has(leaf.value)
        known = leaf.names is None or leaf.value in leaf.names()
        if not (finite and inside and known):
            yield leaf.key, leaf.allowed


def _extensions(config: Config) -> Refusals:
    """Check callbacks and options, after the extensions are imported."""
    names = CALLBACKS.names()
    for name, options in config.callbacks.items():
        if name not in names and names:
            yield "callbacks", " | ".join(names)
        if name not in names:
            none = "No callback is registered. Name the module that registers it in extensions."
            yield "callbacks", Remedy(none)
        if not isinstance(options, dict):
            mapping = f"The options of {name} must be a mapping of names to values, or {{}}."
            yield "callbacks", Remedy(mapping)
        try:
            inspect.signature(CALLBACKS[name]).bind(**options)
        except TypeError as error:
            yield "callbacks", Remedy(f"{name} has other options: {error}.")
    if config.options and not config.extensions:
        yield "options", "{}, as only extensions read it"


def _model(config: Config) -> Refusals:
    model = config.model
    weights = config.init_from
    # it becomes a folder in runs_dir, and must not leave it
    if not FOLDER_NAME.fullmatch(config.name):
        characters = "letters, digits, '.', '_' and '-', with a letter or digit first"
        yield "name", Remedy(f"Use at most 100 {characters}.")
    if config.name.lower() == "latest":
        link = "RUNS_DIR/latest is the link to the newest run. Choose another name."
        yield "name", Remedy(link)
    if model.attention == "full" and model.head_dim is None and model.dim % model.heads:
        yield "model.dim", f"a multiple of model.heads, {model.heads}, if model.head_dim is null"
    if model.heads % (model.kv_heads or model.heads):
        yield "model.kv_heads", f"null or a divisor of model.heads, {model.heads}"
    if model.latent.rope_dim % 2:
        yield "model.latent.rope_dim", "an even number, as positions turn pairs of features"
    if model.attention == "full" and model.family == "llama":
        if model.head_dim is None and model.dim // model.heads % 2:
            yield (
                "model.heads",
                f"a divisor of model.dim, {model.dim}, with an even quotient for rotary embedding",
            )
        if (model.head_dim or 0) % 2:
            yield "model.head_dim", "null or an even number, as positions turn pairs of features"
    if weights is not None and not INIT_FROM.fullmatch(weights):
        yield "init_from", "null, hf:FOLDER or scmoe:FILE"
    if "://" in config.runs_dir:
        local = "A run's directory is on a local or shared disk. Give a folder"
        yield "runs_dir", Remedy(f"{local}, and copy it to a remote storage after the run.")
    newest = os.path.abspath(Path(config.runs_dir) / "latest") + os.sep
    for key, path in (
        ("init_from", (weights or "").partition(":")[2]),
        ("data.tokenizer", config.data.tokenizer),
    ):
        if os.path.abspath(path).startswith(newest):
            link = f"{config.runs_dir}/latest will be the directory of this run"
            yield key, Remedy(f"{link}. Give the path of a run's own directory.")


def _moe(config: Config) -> Refusals:
    moe = config.moe
    model = config.model
    chosen = f"moe.architecture={moe.architecture}"
    if moe.rows == "slots" and moe.capacity_factor is None:
        yield "moe.rows", "auto | filled | buffers where moe.capacity_factor=null"
    if moe.rows == "buffers" and (moe.capacity_factor is not None or moe.dropless_ceiling is None):
        unless = "unless moe.capacity_factor=null and moe.dropless_ceiling is set"
        yield "moe.rows", f"auto | filled | slots, {unless}"
    if moe.architecture == "dense":
        return

    unit = 2 if model.family == "swin" else 8  # stages 3 and 4 are 4 and 8 times as wide
    if model.dim % unit:
        yield (
            "model.dim",
            f"a multiple of {unit}: products of experts need rows aligned to 16 bytes",
        )
    if moe.ffn_dim is None and (model.ffn_dim or 8) % 8:
        yield "model.ffn_dim", "null or a multiple of 8, as with model.dim; or give moe.ffn_dim"
    if (moe.ffn_dim or 8) % 8:
        yield "moe.ffn_dim", "null or a multiple of 8, as with model.dim"
    if moe.top_k > moe.num_experts:
        yield "moe.top_k", f"at most moe.num_experts, {moe.num_experts}"
    others = model.layers - len(moe.leading_dense)
    fit = others >= moe.every and all(1 <= width <= 2**17 for width in moe.leading_dense)
    if moe.leading_dense and not fit:
        most = max(0, model.layers - moe.every)
        yield "moe.leading_dense", f"widths of 1 to 2^17, at most {most} of model.layers"
    if others % moe.every:
        without = " plus the number of moe.leading_dense" if moe.leading_dense else ""
        yield "model.layers", f"a multiple of moe.every, {moe.every}{without}"
    if moe.architecture in ("dgmoe", "dgmoe_share"):
        if moe.top_k != 1:
            yield "moe.top_k", f"1, as each of the two gates of {chosen} chooses one expert"
        if moe.num_experts < 2 and moe.distinct_experts:
            yield "moe.num_experts", f"2 or more, as {chosen} gives each token two experts"
    if moe.architecture == "dgmoe_share" and others < 2 * moe.every:
        least = 2 * moe.every + len(moe.leading_dense)
        yield "model.layers", f"{least} or more, as {chosen} shares one MoE module"
    if moe.architecture in SHORTCUT_SCHEDULES and moe.every == 1:
        yield from _shortcut_in_every_block(config)
    if moe.architecture == "farskip" and moe.every != 1:
        yield "moe.every", f"1, as {chosen} is a block with attention and an MoE module"
    if moe.every == 4 and model.family == "swin":
        yield "moe.every", "1 | 2 with model.family=swin, whose stage 4 has two blocks"
    if moe.architecture == "farskip" and model.family in FAMILIES.images:
        sum_of_two = f"model.family={model.family} normalises the sum of what farskip adds in turn"
        yield "moe.architecture", Remedy(f"{sum_of_two}. Choose another architecture.")


def _shortcut_in_every_block(config: Config) -> Refusals:
    """Check taps where no Block-MLP lies between them."""
    moe = config.moe
    if moe.position == "pos3" or (moe.position == "pos2" and moe.architecture != "scmoe"):
        allowed = "pos1 | pos2" if moe.architecture == "scmoe" else "pos1"
        chosen = f"moe.architecture={moe.architecture}"
        yield "moe.position", f"{allowed} where {chosen} and moe.every=1"
    if moe.first_position is not None and moe.first_position != "pos1":
        yield "moe.first_position", "pos1 | null where moe.every=1"
    if moe.position == "pos2" and moe.first_position is not None:
        first = "null, as the first block's tap is its own where moe.every=1 and pos2"
        yield "moe.first_position", first
    if moe.position == "pos2" and moe.tap_norm == "shared":
        norm = "the norm after the tap is the preceding block's where moe.every=1 and pos2"
        yield "moe.tap_norm", f"own, as {norm}"


def _schedule(config: Config) -> Refusals:
    moe = config.moe
    schedule = config.schedule
    yield from two_batches(config)
    if moe.architecture == "dense":
        if schedule.chunks not in (None, 1):
            yield "schedule.chunks", "1 or null, as moe.architecture=dense has no MoE stream"
        return
    if moe.architecture not in ARCHITECTURES.built_in:
        return
    if schedule.slot is None and not schedule.inside_attention:
        return
    wiring = resolve_wiring(config)
    for position in dict.fromkeys(wiring.taps):
        each = Schedule(wiring.architecture, position)
        if schedule.slot is not None and schedule.slot > len(each.window):
            yield "schedule.slot", f"0 to {len(each.window)} for {each.name}"
        elif schedule.inside_attention and not each.attentions:
            none = f"false for {each.name}, as its window has no attention"
            yield "schedule.inside_attention", none
        elif schedule.inside_attention and schedule.slot not in (None, *each.attentions):
            slots = " | ".join(map(str, each.attentions))
            where = f"for {each.name} where schedule.inside_attention=true"
            yield "schedule.slot", f"{slots} | null {where}"


def _ranks(config: Config) -> Refusals:
    moe = config.moe
    trainer = config.trainer
    strategy = config.strategy
    ep_size = strategy.ep_size or 1
    dense = moe.architecture == "dense"
    world = trainer.devices * trainer.num_nodes
    if dense and ep_size > 1:
        yield "strategy.ep_size", "1 or null, as moe.architecture=dense has no experts"
    if not dense and moe.num_experts % ep_size:
        yield "strategy.ep_size", f"a divisor of moe.num_experts, {moe.num_experts}"
    if world % ep_size:
        yield "strategy.ep_size", f"a divisor of trainer.devices x trainer.num_nodes, {world}"
    if strategy.dense == "hybrid" and (trainer.num_nodes == 1 or trainer.devices == 1):
        unless = "unless trainer.num_nodes and trainer.devices are 2 or more"
        yield "strategy.dense", f"replicated | sharded | auto, {unless}"
    if strategy.dense in ("sharded", "hybrid") and not dense:
        dim = config.model.dim
        holders = world // resolve_ep_size(config)
        if config.model.family == "swin":  # its MoEs are in the stages 3 and 4
            widths = (4 * dim, 8 * dim)
        else:
            widths = (dim, moe.ffn_dim or config.model.ffn_dim or 4 * dim)
        if odd := " and ".join(str(width) for width in widths if width % holders):
            why = (
                f"a width of {odd} is no multiple of the {holders} ranks that hold the same experts"
            )
            yield "strategy.dense", f"replicated, as {why}; or raise strategy.ep_size"
    if strategy.wire_dtype is not None and resolve_ep_size(config) == 1:
        alone = "no rows are sent where every rank has all experts (strategy.ep_size)"
        yield "strategy.wire_dtype", f"null, as {alone}"


def _shares_of_ranks(config: Config) -> Refusals:
    """Check that ranks can share a training's batch equally."""
    data = config.data
    trainer = config.trainer
    batches = trainer.devices * trainer.num_nodes * trainer.accumulate
    if data.global_batch_size % batches:
        parts = "trainer.devices x trainer.num_nodes x trainer.accumulate"
        yield "data.global_batch_size", f"a multiple of {parts}, {batches}"
    if (data.mixup or data.cutmix) and data.global_batch_size % (2 * batches):
        why = "mixup and cutmix need pairs in every rank's batch"
        yield "data.global_batch_size", f"a multiple of {2 * batches}, as {why}"


def _offload(config: Config) -> Refusals:
    guesses = config.offload.way == "speculative"
    least = config.moe.top_k * (2 if guesses else 1)
    if config.offload.slots is not None and config.offload.slots < least:
        why = f"a token's experts of a layer{' and as many guesses' if guesses else ''}"
        yield "offload.slots", f"null, or {least} or more: {why}"


def _data(config: Config) -> Refusals:
    """Check paths and vocabularies, and whether data and model fit together."""
    data = config.data
    named = f"data.name={data.name}"
    images = data.name in IMAGES
    if data.name in ("text", "hf", "image_folder") and data.path is None:
        yield "data.path", Remedy(f"{named} reads from it. Give a path.")
    if data.name == "synthetic" and (data.val_sequences or 0) > MOST_SYNTHETIC:
        yield "data.val_sequences", f"null or at most {MOST_SYNTHETIC}, as {named} has no end"
    smallest = SMALLEST_VOCABULARY.get(data.tokenizer, LEAST_IDS)
    if data.name in TEXT_DATASETS and data.vocab_size < smallest:
        yield "data.vocab_size", f"{smallest} or more for data.tokenizer={data.tokenizer}"
    if data.vocab_size < LEAST_IDS:
        yield "data.vocab_size", f"{LEAST_IDS} or more"
    reads_images = config.model.family in FAMILIES.images
    if reads_images != images:
        names = f"{'' if reads_images else 'anything but '}{', '.join(IMAGES)}"
        yield "data.name", f"{names} for model.family={config.model.family}"
    if images and config.model.family in FAMILIES.built_in:
        yield from _swin(config)


def _swin(config: Config) -> Refusals:
    model = config.model
    data = config.data
    step = 8 * model.patch_size  # three stages halve the feature map
    if data.image_size % step:
        yield "data.image_size", f"a multiple of 8 x model.patch_size, {step}"
    widths = [data.image_size // model.patch_size // 2**stage for stage in range(4)]
    if any(width > model.window and width % model.window for width in widths):
        maps = ", ".join(map(str, widths))
        yield "model.window", f"a divisor of the width of each larger feature map: {maps}"
