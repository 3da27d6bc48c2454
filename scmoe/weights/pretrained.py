"""Weights of folders of transformers' models (families.py) and of files of `make export`, under our
names.

Only local safetensors and JSON files are read: no download, no pickle. Names and shapes are read
first, and each weight, or each expert of a stack, when upcycle.py copies it into a model. The
settings that determine a model are compared with those of the weights.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe.config.derived import FAMILY_ACTIVATIONS, SHORTCUT_SCHEDULES
from scmoe.config.fields import Config
from scmoe.config.leaves import flatten, leaves, show
from scmoe.config.registry import ARCHITECTURES, FAMILIES
from scmoe.parallel.checkpoint.export import read_settings
from scmoe.weights.families import READERS, reader_name
from scmoe.weights.names import in_our_layout, is_unread

# A reader makes a name for each matrix of each expert before it compares them with the files, so a
# wrong number would fill the memory. Published models have up to 130 layers, and up to 24,000
# experts in all layers together.
MOST_LAYERS = 2000
MOST_EXPERTS = 200_000
LAYER_KEYS = ("n_layer", "num_hidden_layers", "num_layers", "first_k_dense_replace", "layers")
EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "zero_expert_num",
    "zero_experts",
)


class Checkpoint(NamedTuple):
    """The weights in files, and what is known about them.

    weights: under our names, in the layout of our parameters, on the meta device. read: returns a
    weight by its name; of a stack of experts, the expert of a number. labels: the name of each
    weight in the files. settings: the configuration that the weights belong to, as far as the files
    tell it. problems: what is missing, unknown or different; if there are any, no weight may be
    read.
    """

    weights: dict[str, Tensor]
    read: Callable[[str, int | None], Tensor]
    labels: dict[str, str]
    settings: dict[str, Any]
    problems: list[str]


def read_export(file: Path) -> Checkpoint:
    """Read a file of `make export`, dense or MoE. Raises ValueError for any other file."""
    settings = read_settings(file)
    stored = stored_in([file])
    weights = {name: tensor.on_meta for name, tensor in stored.items()}
    labels = {name: name for name in stored}
    return Checkpoint(weights, lambda name, e: stored[name].read(e), labels, settings, [])


def read_hf(folder: Path) -> Checkpoint:
    """Read a folder of transformers' `save_pretrained`: config.json and *.safetensors.

    Raises ValueError for others.
    """
    config = read_config(folder, tuple(READERS))
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder} has no weights in *.safetensors. Other formats are not read.")
    family = reader_name(config)
    try:
        settings, problems, names = READERS[family](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}: config.json is not that of a {family}: {error!r}") from error

    stored = {
        name.removeprefix("transformer.").removeprefix("model."): tensor
        for name, tensor in stored_in(files).items()
    }
    wanted = {part for parts in names.values() for part in parts}
    problems += [f"{name} is missing" for name in sorted(wanted - stored.keys())]
    further = sorted(stored.keys() - wanted)
    problems += [f"{name} is unknown" for name in further if not is_unread(family, config, name)]
    experts = settings.get("moe.num_experts", 0)

    def read(ours: str, expert: int | None) -> Tensor:
        parts = names[ours]
        if expert is not None:
            each = len(parts) // experts
            parts = parts[each * expert : each * (expert + 1)]
        joined = torch.cat([stored[part].read() for part in parts])
        weight = in_our_layout(family, ours, joined, 1)
        return weight if expert is None else weight[0]

    labels = {
        ours: " + ".join(parts) for ours, parts in names.items() if stored.keys() >= set(parts)
    }
    weights: dict[str, Tensor] = {}
    for ours, label in labels.items():
        tensors = [stored[part].on_meta for part in names[ours]]
        if len({t.shape[1:] for t in tensors}) > 1 or any(t.dim() == 0 for t in tensors):
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
            problems.append(f"{label} have shapes {shapes}")
        else:
            weights[ours] = in_our_layout(family, ours, torch.cat(tensors), experts)
    return Checkpoint(weights, read, labels, settings, problems)


def read_config(folder: Path, families: tuple[str, ...]) -> dict[str, Any]:
    """Return the content of config.json.

    Raises ValueError if there is none, or if its model is of none of these families.
    """
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = reader_name(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder}: config.json cannot be read: {error!r}") from error
    if family not in families:
        raise ValueError(f"{folder}: model_type is {family!r}, allowed: {', '.join(families)}")
    layers = largest(content, LAYER_KEYS)
    experts = largest(content, EXPERT_KEYS)
    if layers > MOST_LAYERS or layers * experts > MOST_EXPERTS:
        raise ValueError(
            f"{folder}: config.json has {layers} layers with {experts} experts, allowed: up to"
            f" {MOST_LAYERS} layers, and up to {MOST_EXPERTS} experts in all layers together"
        )
    return content


def largest(content: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the largest number that a config.json has under these names, in sections too; 0 if it
    has none."""
    numbers = [value for name, value in content.items() if name in names and isinstance(value, int)]
    sections = [value for value in content.values() if isinstance(value, dict)]
    return max(numbers + [largest(section, names) for section in sections], default=0)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, without hidden ones, which a killed export leaves
    half written."""
    return sorted(folder.glob("[!.]*.safetensors"))


class TensorInFile(NamedTuple):
    """A tensor in a file of which only the header has been read.

    The file is mapped into memory, and the ranks of a node share it.
    """

    file: Any  # of safe_open, which stays open
    name: str
    on_meta: Tensor

    def read(self, row: int | None = None) -> Tensor:
        """Return the tensor, or one row of its first dim."""
        if row is None:
            return self.file.get_tensor(self.name)
        return self.file.get_slice(self.name)[row]


def stored_in(paths: list[Path]) -> dict[str, TensorInFile]:
    """Return the tensors of safetensors files by name. Raises ValueError for other files."""
    stored: dict[str, TensorInFile] = {}
    for path in paths:
        try:
            file: Any = safe_open(path, framework="pt")
            names = file.keys()
            shapes = {name: file.get_slice(name).get_shape() for name in names}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for name, shape in shapes.items():
            stored[name] = TensorInFile(file, name, torch.empty(shape, device="meta"))
    return stored


def check_settings(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise ValueError naming all keys in which a checkpoint's settings differ. A dense one may
    have another architecture: upcycling."""
    other = [
        f"{key} is {show(here[key]) if key in here else 'unknown'}, allowed: {show(value)}"
        for key, value in there.items()
        if here.get(key, there) != value and (key, value) != ("moe.architecture", "dense")
    ]
    if other:
        raise ValueError(f"its weights belong to a model with other settings: {'; '.join(other)}")


def resolved_settings(config: Config) -> dict[str, Any]:
    """Return the config's values by key, with null resolved where other values determine it."""
    model, moe = config.model, config.moe
    resolved: dict[str, Any] = {"moe.first_position": moe.first_position or moe.position}
    if model.family in FAMILY_ACTIVATIONS:
        resolved["model.ffn_dim"] = model.ffn_dim or 4 * model.dim
        resolved["moe.ffn_dim"] = moe.ffn_dim or resolved["model.ffn_dim"]
        resolved["model.activation"] = model.activation or FAMILY_ACTIVATIONS[model.family]
        resolved["model.kv_heads"] = model.kv_heads or model.heads
        resolved["model.head_dim"] = model.head_dim or model.dim // model.heads
    return flatten(config) | resolved


def model_settings(config: Config) -> dict[str, Any]:
    """Return the settings in which two models must be equal to share their weights. An export has
    them in its header."""
    architecture = config.moe.architecture
    keys = ["model.family", "model.layers", "model.dim", "model.heads"]
    if config.model.family in FAMILIES.images:
        keys += ["model.patch_size", "model.window", "data.image_size", "data.num_classes"]
    else:
        keys += ["model.kv_heads", "model.ffn_dim", "model.activation", "data.vocab_size"]
    if config.model.attention == "full":
        keys.append("model.head_dim")
    if config.model.family == "llama":
        keys += ["model.norm_eps", "model.rope_theta"]
    keys.append("moe.architecture")
    if config.model.attention == "latent":
        keys.append("model.attention")
        keys += [leaf.key for leaf in leaves(config.model.latent, "model.latent.")]
    if architecture != "dense":
        keys += [
            "moe.after_norm",
            "moe.num_experts",
            "moe.top_k",
            "moe.renormalise",
            "moe.noisy",
            "moe.every",
        ]
        keys += [
            "moe.ffn_dim",
            "moe.router",
            "moe.router_scale",
            "moe.leading_dense",
            "moe.zero_experts",
        ]
    is_extension = architecture not in ARCHITECTURES.built_in  # it may read all of these keys
    if architecture in SHORTCUT_SCHEDULES or is_extension:
        keys += ["moe.position", "moe.first_position", "moe.tap_norm"]
    if SHORTCUT_SCHEDULES.get(architecture) == "dgmoe" or is_extension:
        keys.append("moe.distinct_experts")
    if architecture in ("shared_expert", "scmoe") or is_extension:
        keys += ["moe.combine", "moe.coefficient_input"]
    if config.extensions:
        keys.append("options")
    here = resolved_settings(config)
    return {key: here[key] for key in keys}
