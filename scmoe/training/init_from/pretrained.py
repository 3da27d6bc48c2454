"""Reads weights under our names: folders of transformers' models (families.py), and files of `make export`.

Only local safetensors and JSON files are read: no download, no pickle. upcycle.py copies the weights into a model.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe.parallel.checkpoint.export import read_settings
from scmoe.training.init_from.families import READERS, in_our_layout


class Checkpoint(NamedTuple):
    """Weights that were read, and what is known about them.

    problems: messages about what is missing, unknown or different; with any, no weight may be loaded.
    """

    weights: dict[str, Tensor]  # under our names, in the layout of our parameters
    labels: dict[str, str]  # the name of each in the files
    settings: dict[str, Any]  # the config's keys that the weights belong to, as far as the files say
    problems: list[str]


def read_export(file: Path) -> Checkpoint:
    """Read a file of `make export`, dense or MoE. Raises ValueError for any other file."""
    settings, weights = read_settings(file), read_safetensors([file])
    return Checkpoint(weights, {name: name for name in weights}, settings, [])


def read_hf(folder: Path) -> Checkpoint:
    """Read a folder of transformers' `save_pretrained`: config.json and *.safetensors. Raises ValueError for others."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder}: config.json cannot be read: {error}") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights in *.safetensors; other formats are not read")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in READERS:
        raise ValueError(f"{folder}: model_type is {family!r}, allowed: {', '.join(READERS)}")
    weights = read_safetensors(files)
    try:
        settings, problems, names = READERS[family](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}: config.json is not that of a {family}: {error!r}") from error
    theirs = {name.removeprefix("transformer.").removeprefix("model."): weight for name, weight in weights.items()}
    wanted = {part for parts in names.values() for part in parts}
    unused: tuple[str, ...] = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")  # masks and angles in old files
    if config.get("tie_word_embeddings", family == "gpt2"):
        unused += ("lm_head.weight",)
    problems += [f"{name} is missing" for name in sorted(wanted - theirs.keys())]
    problems += [f"{name} is unknown" for name in sorted(theirs.keys() - wanted) if not name.endswith(unused)]
    checkpoint = Checkpoint({}, {}, settings, problems)
    for ours, parts in names.items():
        found = [theirs[part] for part in parts if part in theirs]
        if len(found) < len(parts):
            continue
        checkpoint.labels[ours] = " + ".join(parts)
        if len({w.shape[1:] for w in found}) > 1 or any(w.dim() == 0 for w in found):
            problems.append(f"{' + '.join(parts)} have shapes {', '.join(str(tuple(w.shape)) for w in found)}")
            continue
        weight = torch.cat(found)
        checkpoint.weights[ours] = in_our_layout(family, ours, weight, settings)
    return checkpoint


def read_safetensors(files: list[Path]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    return weights
