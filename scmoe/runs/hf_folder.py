"""Writes a folder of Hugging Face's form from a checkpoint. transformers is not needed for it.

    config.json  generation_config.json
    model.safetensors, or model-00001-of-0000N.safetensors with model.safetensors.index.json above SHARD_BYTES
    tokenizer.json  tokenizer_config.json     of a model of text
    README.md    the model card; one that is there stays, as it may have been edited

Tensors are read and written file by file, so memory holds one of these files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from scmoe.config.fields import Config
from scmoe.init_from.families import READERS, in_their_layout
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import check_same_model, read_named, tensors_of
from scmoe.parallel.checkpoint.saving import write_whole
from scmoe.runs.card import model_card
from scmoe.runs.hf_config import OURS, hf_config
from scmoe.training.assembly.model import build_model_on_meta

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
STORED = "model.model."  # what the names of the network's weights begin with in a checkpoint


def write_folder(
    checkpoint: Path, folder: Path, config: Config, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES
) -> str:
    """Write the folder and return its model_type. Each file is complete or absent, and config.json comes last.

    tokenizer: of the data, or None. ValueError: a broken checkpoint, another model's, or no language model.
    """
    content = hf_config(config, None if tokenizer is None else tokenizer.end_of_text)
    durable.verify(checkpoint)
    stored = {name.removeprefix(STORED): t for name, t in tensors_of(checkpoint).items() if name.startswith(STORED)}
    own = dict(build_model_on_meta(config).named_parameters())
    check_same_model(checkpoint, own, {name: tuple(t.shape) for name, t in stored.items()})
    content["dtype"] = str(next(iter(stored.values())).dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("model*.safetensors"), folder / INDEX, folder / "config.json"):
        old.unlink(missing_ok=True)
    write_weights(checkpoint, folder, content, list(groups(stored, shard_bytes)))
    ends = {key: content[key] for key in ("bos_token_id", "eos_token_id") if content[key] is not None}
    write_json_durably(folder / "generation_config.json", {**ends, "max_length": config.data.seq_len})
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, config.data.seq_len)
    if not (folder / "README.md").exists():
        step, parameters = durable.read_manifest(checkpoint)["step"], sum(p.numel() for p in own.values())
        durable.write_durably(folder / "README.md", model_card(config, content, step, parameters))
    write_json_durably(folder / "config.json", content)
    return content["model_type"]


def groups(stored: dict[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names of consecutive tensors with together at most shard_bytes, or of one larger one."""
    group: list[str] = []
    for name, tensor in stored.items():
        if group and sum(stored[other].nbytes for other in group) + tensor.nbytes > shard_bytes:
            yield group
            group = []
        group.append(name)
    yield group


def write_weights(checkpoint: Path, folder: Path, content: dict[str, Any], shards: list[list[str]]) -> None:
    places: dict[str, str] = {}
    total = 0
    for i, group in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        read = read_named(checkpoint, [STORED + name for name in group])
        theirs = {name: t for ours in group for name, t in renamed(content, ours, read.pop(STORED + ours))}
        with durable.replacing(folder / file) as partial:
            write_whole(theirs, partial, {"format": "pt"})
        places |= dict.fromkeys(theirs, file)
        total += sum(t.nbytes for t in theirs.values())
    if len(shards) > 1:
        write_json_durably(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def renamed(content: dict[str, Any], ours: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what a folder of this config.json keeps in place of our parameter: names and tensors."""
    family = content["model_type"]
    if family == OURS:
        yield f"model.{ours}", weight
        return
    settings, _, names = READERS[family](content)
    parts = in_their_layout(family, ours, weight, names[ours], settings)
    for name, part in zip(names[ours], parts, strict=True):
        yield name if name == "lm_head.weight" else f"{'transformer' if family == 'gpt2' else 'model'}.{name}", part


def write_tokenizer(folder: Path, tokenizer: Any, seq_len: int) -> None:
    tokenizer.save(folder / "tokenizer.json")
    end = tokenizer.end_token
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end}
    rest = {"model_max_length": seq_len, "clean_up_tokenization_spaces": False, "add_prefix_space": False}
    write_json_durably(folder / "tokenizer_config.json", {**settings, **rest})


def write_json_durably(path: Path, content: dict[str, Any]) -> None:
    durable.write_durably(path, json.dumps(content, indent=2) + "\n")
