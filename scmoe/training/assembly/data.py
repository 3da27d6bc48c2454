"""Builds the datamodule of a configuration, and prepares its data.

A data set is a function (config, arguments of PositionedDataModule) -> datamodule, registered by
its name.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scmoe.config.derived import max_steps
from scmoe.config.fields import Config
from scmoe.config.installation import explained
from scmoe.config.leaves import ConfigError
from scmoe.config.registry import DATASETS
from scmoe.datamodules.positioned import PositionedDataModule
from scmoe.datamodules.sequences import SyntheticDataModule
from scmoe.datamodules.text import TextDataModule
from scmoe.datamodules.tokenizer import Tokenizer
from scmoe.parallel.checkpoint.loading import read_meta
from scmoe.parallel.checkpoint.state import META

register_dataset = DATASETS.register
TOKENIZER_FILE = "tokenizer.json"  # of a folder of Hugging Face


def prepare_data(
    data: PositionedDataModule, weights: Path | None = None, warn: bool = True
) -> None:
    """Download, tokenize and check the data, before other ranks are started. ConfigError: it cannot
    be used.

    weights: a checkpoint, an export or a folder of Hugging Face that reads it. warn: say that files
    are skipped.
    """
    with errors_in_one_line():
        data.prepare_data()
        data.setup("fit")
    if data.skipped and warn:
        more = "; scmoe check-data lists all" if len(data.skipped) > 1 else ""
        print(
            f"warning: {len(data.skipped)} files are skipped: {data.skipped[0]}{more}",
            file=sys.stderr,
            flush=True,
        )
    if weights is not None and isinstance(data, TextDataModule):
        check_tokenizer(data, weights)


def build_datamodule(config: Config) -> PositionedDataModule:
    """Return the datamodule. Images are opened here, so that missing data is an error before a
    process is started."""
    data = config.data
    trainer = config.trainer
    position: dict[str, Any] = dict(
        global_batch_size=data.global_batch_size,
        accumulate=trainer.accumulate,
        num_batches=max_steps(config) * trainer.accumulate,
        workers=data.workers,
        seed=config.seed,
        overfit=trainer.overfit_batches,
    )
    with errors_in_one_line():
        return DATASETS[data.name](config, position)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn what cannot be read, and a package that is missing, into ConfigError."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise explained(error) or error from error
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


@register_dataset("synthetic")
def synthetic(config: Config, position: Mapping[str, Any]) -> PositionedDataModule:
    data = config.data
    return SyntheticDataModule(
        data.vocab_size, seq_len=data.seq_len, val_sequences=data.val_sequences, **position
    )


@register_dataset("sotu")
@register_dataset("text")
@register_dataset("hf")
def text(config: Config, position: Mapping[str, Any]) -> PositionedDataModule:
    data = config.data
    return TextDataModule(
        data.name,
        data.path,
        data.subset,
        data.tokenizer,
        data.vocab_size,
        data.cache_dir,
        data.on_error == "skip",
        data.text_field,
        seq_len=data.seq_len,
        val_sequences=data.val_sequences,
        **position,
    )


@register_dataset("fashion_mnist", images=True)
@register_dataset("digits", images=True)
@register_dataset("image_folder", images=True)
def images(config: Config, position: Mapping[str, Any]) -> PositionedDataModule:
    # Imported here, as they need the extra `vision`.
    from scmoe.datamodules.image_sets import open_images
    from scmoe.datamodules.images import ImageDataModule

    data = config.data
    return ImageDataModule(
        open_images(data.name, data.path),
        image_size=data.image_size,
        num_classes=data.num_classes,
        augment=data.augment,
        mixup=data.mixup,
        cutmix=data.cutmix,
        label_smoothing=data.label_smoothing,
        val_images=data.val_sequences,
        skip=data.on_error == "skip",
        **position,
    )


def prepared_tokenizer(config: Config, weights: Path) -> Tokenizer | None:
    """Return the tokenizer of a text data set, prepared if it is not yet; None for other data.

    ConfigError: there is no data, or it has another tokenizer than that of the weights.
    """
    data = build_datamodule(config)
    if not isinstance(data, TextDataModule):
        return None
    prepare_data(data, weights)
    return data.tokenizer


def check_tokenizer(data: TextDataModule, weights: Path) -> None:
    """Raise ConfigError if the prepared data has another tokenizer than the weights' training.

    A text that has changed makes another `bpe`.
    """
    if kept_tokenizer(weights) not in (None, data.tokenizer.digest):
        own = weights / TOKENIZER_FILE
        remedy = "the text of the training, or the tokenizer.json made from it"
        if own.exists():
            remedy = f"data.tokenizer={own}"
        raise ConfigError(
            f"data.path={data.path} and data.tokenizer={data.tokenizer_kind} give another tokenizer"
            f" than in training, so token ids would mean other words. Use {remedy}."
        )


def kept_data(data: PositionedDataModule, weights: Path) -> Any:
    """Return the digest of the data that a checkpoint was trained on; None: it has none, or is an
    export."""
    if not weights.is_dir():
        return None
    return read_meta(weights).get(type(data).__qualname__, {}).get("data")


def kept_tokenizer(weights: Path) -> str | None:
    """Return the digest of the tokenizer with which a checkpoint or an export was trained, or that
    a folder of Hugging Face has; None: it has none."""
    if (weights / TOKENIZER_FILE).exists():
        with suppress(ValueError):  # one that no data of ours can have says nothing of its ids
            return Tokenizer.load(weights / TOKENIZER_FILE).digest
    if weights.is_dir():
        meta = read_meta(weights) if any(weights.glob(f"*{META}")) else {}
        return meta.get(TextDataModule.__qualname__, {}).get("tokenizer")
    from scmoe.parallel.checkpoint.export import read_header

    return read_header(weights).get("tokenizer")
