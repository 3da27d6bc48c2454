"""Exports whole weights from a checkpoint to one file, and loads them into a model, or a rank's
part of one."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scmoe.files import replacing, write_in_turn
from scmoe.moe.experts import Experts
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import (
    NETWORK_PREFIX,
    check_same_model,
    network_in,
    read_named,
)
from scmoe.parallel.dense.sharded import put

FORMAT_VERSION = "2"
EXPORT = ".safetensors"  # how the name of an exported file ends


def consolidate(
    checkpoint: Path,
    out: Path,
    model: nn.Module,
    settings: Mapping[str, Any],
    tokenizer: str | None = None,
) -> None:
    """Write the weights of a checkpoint to one safetensors file, experts by global id.

    The file is complete or absent. Memory holds one weight at a time.

    model: whole, on any device. settings: of the model, for the file's header, because names and
    shapes do not determine it. tokenizer: its digest, for the header. ValueError: a broken
    checkpoint, or another model's.
    """
    weights = network_in(checkpoint, model)
    header = {
        "format": "pt",
        "format_version": FORMAT_VERSION,
        "step": str(durable.read_manifest(checkpoint)["step"]),
        "settings": json.dumps(settings),
        "checkpoint": checkpoint.name,
    }
    if tokenizer is not None:
        header["tokenizer"] = tokenizer
    with replacing(out) as partial:
        write_in_turn(
            weights,
            lambda name: read_named(checkpoint, [NETWORK_PREFIX + name])[NETWORK_PREFIX + name],
            partial,
            header,
        )


@torch.no_grad()
def load_weights(path: Path, model: nn.Module) -> None:
    """Read an exported file into a model. ValueError: another model's, or another format."""
    read = exported_by_name(path, model)
    for name, p in model.named_parameters():
        put(p, read(name))


def exported_by_name(path: Path, model: nn.Module) -> Callable[[str], Tensor]:
    """Return a function that reads one parameter by its name in the model.

    Of experts it reads only those that the model has. model: may be on the meta device. ValueError:
    another model's file, or another format.
    """
    read_settings(path)
    parameters = dict(model.named_parameters())
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    experts = {
        f"{prefix}.{name}": m for prefix, m in stacks.items() for name, _ in m.named_parameters()
    }
    whole = {
        name: parameters[name].new_empty(
            module.num_experts, *parameters[name].shape[1:], device="meta"
        )
        for name, module in experts.items()
    }
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        there = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    check_same_model(path, parameters | whole, there)

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            if name not in experts:
                return file.get_tensor(name)
            ids = experts[name].expert_ids
            return file.get_slice(name)[ids.start : ids.stop]

    return read


def read_header(path: Path) -> dict[str, str]:
    """Return the header of an exported file. ValueError: another format, or no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if (version := header.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, allowed: {FORMAT_VERSION}")
    return header


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of an exported file's model. ValueError: as `read_header`."""
    header = read_header(path)
    try:
        return dict(json.loads(header["settings"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its header does not hold the model's settings: {error!r}"
        ) from error
