"""A trained model in one process, from a run, an exported file or a folder of Hugging Face.

Experts may be offloaded, so that the process never holds all of them: `store_experts` copies them
from file to file, one layer at a time, and `load_offloaded` reads the other weights only. It builds
the network on the meta device, so only language models can be offloaded: vision models have tensors
that are no weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_kept
from scmoe.files import relative
from scmoe.inference.offload.cache import Cache
from scmoe.inference.offload.migration import offload_experts
from scmoe.inference.offload.store import Read, StoreError, expert_layers, write_store
from scmoe.parallel.checkpoint.export import EXPORT, exported_by_name, load_weights, read_settings
from scmoe.parallel.checkpoint.loading import check_same_model, load_model, weights_by_name
from scmoe.report import say
from scmoe.training.assembly.model import build_model, build_model_on_meta
from scmoe.training.assembly.rank_job import cpu_threads
from scmoe.training.run.machine import has_gpus, set_deterministic
from scmoe.training.run.resume import Which, checkpoint_config, find_checkpoint
from scmoe.weights.families import READERS
from scmoe.weights.hf_config import OUR_MODEL_TYPE, dropless, our_config
from scmoe.weights.pretrained import (
    check_settings,
    read_config,
    read_hf,
    resolved_settings,
    stored_in,
    weight_files,
)
from scmoe.weights.upcycle import fill


def load_trained(path: str | Path, which: Which = "last") -> Any:
    """Return the whole model in eval mode, on the CPU. It is dropless: no token's output depends on
    other texts.

    path: a run's directory, a .safetensors file of `make export` with config.yaml beside it, or a
    folder with config.json. which: of a run's checkpoints. Raises ValueError if it is none of
    these, or broken, or was trained with extensions that the program has not imported.
    """
    path = Path(path)
    if (path / "config.json").exists():
        return load_folder(path)
    if path.suffix == EXPORT:
        config = load_kept(path.parent / "config.yaml")
        check_export(path, config)
        model = build(config)
        load_weights(path, model)
        return model
    if not (path / "checkpoints").is_dir():
        raise ValueError(
            f"{path} holds no model. Give the directory of a run, a .safetensors file of make"
            " export, or a folder with config.json."
        )
    checkpoint = find_checkpoint(path, which)
    model = build(checkpoint_config(checkpoint))
    load_model(checkpoint, model)
    return model


def check_export(file: Path, config: Config) -> None:
    """Raise ConfigError if the config.yaml beside an exported file describes another model than the
    file's header."""
    try:
        check_settings(resolved_settings(config), read_settings(file))
    except ValueError as error:
        raise ConfigError(
            f"{file} cannot be used with the config.yaml beside it: {error}"
        ) from error


def build(config: Config) -> Any:
    return build_model(dropless(config)).eval()


@torch.no_grad()
def load_folder(folder: Path) -> Any:
    """Return the model of a folder of Hugging Face's form, written by `make export` or by
    transformers."""
    content = read_config(folder, (OUR_MODEL_TYPE, *READERS))
    model = build(our_config(content, str(folder / "config.json")))
    if content.get("model_type") != OUR_MODEL_TYPE:
        fill(model, read_hf(folder))
        return model

    parameters = dict(model.named_parameters())
    in_files = stored_in(weight_files(folder))
    stored = {name.removeprefix("model."): tensor for name, tensor in in_files.items()}
    if "head.weight" not in parameters:  # it is tied
        stored.pop("head.weight", None)
    shapes = {name: tuple(tensor.on_meta.shape) for name, tensor in stored.items()}
    check_same_model(folder, parameters, shapes)
    for name, p in parameters.items():
        p.copy_(stored[name].read())
    return model


def store_experts(config: Config, source: Path, path: Path) -> None:
    """Write the experts of a checkpoint (a directory) or of a file of `make export` into the store
    at `path`.

    Raises ValueError for a broken source, or another model's.
    """
    model = build_model_on_meta(config)
    write_store(path, model, reader(source, model))


@contextmanager
def offloaded(config: Config, source: Path) -> Iterator[tuple[Any, Cache]]:
    """Yield the model of a checkpoint or an export as config.offload says, and its cache, which is
    closed at the end.

    The store is offload/<name of the source>.experts.safetensors beside the checkpoints, or beside
    the export. It is written where it is missing. Raises ConfigError for what cannot be honoured,
    and for a store that cannot be used.
    """
    folder = (source.parents[1] if source.is_dir() else source.parent) / "offload"
    path = folder / f"{source.name}.experts.safetensors"
    torch.set_num_threads(cpu_threads(config))
    set_deterministic(config.trainer.deterministic)
    device = torch.device("cuda" if has_gpus(config) else "cpu")
    try:
        if not path.exists():
            folder.mkdir(exist_ok=True)
            say(f"experts are written to {relative(path)}")
            store_experts(config, source, path)
        model, cache = load_offloaded(config, source, path, device)
    except (OSError, ValueError) as error:
        advice = ""
        if isinstance(error, StoreError):
            advice = f"; remove {relative(path)} and it is written again"
        raise ConfigError(f"offload: {error}{advice}") from error
    with cache, torch.inference_mode():
        yield model, cache


def load_offloaded(
    config: Config, source: Path, path: Path, device: torch.device | None = None
) -> tuple[nn.Module, Cache]:
    """Return the model in evaluation mode, with experts from the store at `path` as config.offload
    says, and the cache, to be closed at the end. Errors are those of `offload_experts`."""
    model = build_model_on_meta(config).eval()
    read = reader(source, model)
    of_experts = tuple(f"{layer}." for layer in expert_layers(model))
    filled = {
        p: nn.Parameter(read(name).to(device, p.dtype), requires_grad=False)
        for name, p in model.named_parameters()
        if not name.startswith(of_experts)
    }
    # A tied weight is filled under each of its names.
    names = model.named_parameters(remove_duplicate=False)
    state = {name: filled[p] for name, p in names if p in filled}
    model.load_state_dict(state, strict=False, assign=True)

    offload = config.offload
    cache = offload_experts(
        model, path, way=offload.way, slots=offload.slots, rate_mb_s=offload.rate_mb_s
    )
    return model, cache


def reader(source: Path, model: nn.Module) -> Read:
    """Return a function that reads a parameter of `model` by name.

    Raises ValueError if the source belongs to another model.
    """
    return weights_by_name(source, model) if source.is_dir() else exported_by_name(source, model)
