"""Checks the data of a configuration: paths, vocabularies, and whether model and data are both of images or of text."""

from collections.abc import Iterator

from scmoe.config.fields import Config
from scmoe.config.leaves import Rule, flatten, show
from scmoe.config.registry import DATASETS, FAMILIES, IMAGES, TEXTS

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


def data_rules(config: Config) -> Iterator[Rule]:
    """Yield what `validate` checks of the data, and whether they fit to the model."""
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
