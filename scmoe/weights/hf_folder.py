"""Folders of Hugging Face's form: config.json, weights, tokenizer and model card.

They are written without transformers.

    config.json, generation_config.json      hf_config.py
    model.safetensors; above SHARD_BYTES, model-00001-of-0000N.safetensors and an index
    tokenizer.json, tokenizer_config.json    of a model of text
    README.md                                the model card; an existing one stays, as it may have
                                             been edited
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scmoe.config.derived import max_steps
from scmoe.config.fields import Config
from scmoe.files import read_json, replacing, sync, write_durably, write_in_turn, write_whole
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import NETWORK_PREFIX, network_in, read_named
from scmoe.weights.families import READERS
from scmoe.weights.hf_config import OUR_MODEL_TYPE, hf_config
from scmoe.weights.names import in_their_layout, zero_expert_names
from scmoe.weights.pretrained import weight_files

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
# The header of each file of weights. transformers reads the first entry; the second marks a file
# that an export may replace.
HEADER = {"format": "pt", "written_by": "scmoe"}

CARD = """---
{head}license: unknown  # choose one, such as apache-2.0
---

# {family}, {architecture}

A language model with {parameters:,} parameters, trained with scmoe for {step:,} of {steps:,} \
optimizer steps of {batch:,} sequences with {seq_len:,} tokens each, on {data}.{moe}

## Load it

```bash
{install}
```

```python
{loading}```

With scmoe installed, `scmoe.load(folder)` returns the same network without transformers.

## Evaluation

{evaluation} `make evaluate` has perplexity on other texts, and tasks.

## Settings of the training

```yaml
{settings}```

## Licence and limits

No licence is chosen yet: change the line `license:` at the top. Add what the model is for. It was \
not trained to follow instructions, or to be safe.
"""


def write_folder(
    checkpoint: Path,
    folder: Path,
    config: Config,
    model: nn.Module,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
    metrics: Sequence[Mapping[str, float]] = (),
) -> str:
    """Write the folder and return its model_type. Each file is complete or absent, and config.json
    comes last.

    model: of the config, on any device. tokenizer: of the data, or None. metrics: rows of the run's
    metrics.csv, for the card. Raises ValueError for a checkpoint that is broken, another model's or
    no language model's, and for a folder with files that are not an export of this model.
    """
    content = hf_config(config, None if tokenizer is None else tokenizer.end_of_text)
    stored = network_in(checkpoint, model)
    content["dtype"] = str(next(iter(stored.values())).dtype).removeprefix("torch.")
    refuse_other_files(folder, content, config.init_from)

    folder.mkdir(parents=True, exist_ok=True)
    of_killed_export = folder.glob(".tmp-????????-*")
    for old in (*weight_files(folder), *of_killed_export, folder / INDEX, folder / "config.json"):
        old.unlink(missing_ok=True)

    write_weights(checkpoint, folder, content, list(groups(stored, shard_bytes)))
    keys = ("bos_token_id", "eos_token_id")
    ends = {key: content[key] for key in keys if content[key] is not None}
    write_whole(folder / "generation_config.json", ends)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, config.data.seq_len)
    if not (folder / "README.md").exists():
        step = durable.read_manifest(checkpoint)["step"]
        parameters = sum(p.numel() for p in model.parameters())
        evaluation = evaluation_of(metrics, step)
        with replacing(folder / "README.md") as partial:
            write_durably(partial, model_card(config, content, step, parameters, evaluation))
    write_whole(folder / "config.json", content)
    return content["model_type"]


def refuse_other_files(folder: Path, content: dict[str, Any], init_from: str | None) -> None:
    """Raise ValueError if an export would remove weights or a config.json that are not an export of
    this model.

    content: of its config.json. init_from: the training's; that folder is never written to.
    """
    advice = "Choose another folder with --out, or remove its files first."
    kind, _, source = (init_from or "").partition(":")
    if kind == "hf" and Path(source).resolve() == folder.resolve():
        raise ValueError(f"{folder} is the folder that the training started from. {advice}")
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                header = weights.metadata() or {}
        except (OSError, SafetensorError):
            header = {}
        if header.get("written_by") != HEADER["written_by"]:
            raise ValueError(
                f"{file} was not written by an export, and an export would remove it. {advice}"
            )

    kept = read_json(folder / "config.json")
    of_training = {"dtype", "bos_token_id", "eos_token_id"}
    as_json = json.loads(json.dumps(content))
    differs = any(
        kept.get(key) != value for key, value in as_json.items() if key not in of_training
    )
    if (folder / "config.json").exists() and differs:
        raise ValueError(f"{folder} has the config.json of another model. {advice}")


def groups(stored: dict[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Yield the names of consecutive tensors that have at most shard_bytes together, or of a single
    larger tensor."""
    group: list[str] = []
    for name, tensor in stored.items():
        if group and sum(stored[other].nbytes for other in group) + tensor.nbytes > shard_bytes:
            yield group
            group = []
        group.append(name)
    yield group


def write_weights(
    checkpoint: Path, folder: Path, content: dict[str, Any], shards: list[list[str]]
) -> None:
    """Write the files of weights, and an index if there are several.

    content: of config.json. shards: our names of the weights in each file.
    """
    file_of: dict[str, str] = {}
    total = 0
    for i, group in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        read = read_named(checkpoint, [NETWORK_PREFIX + name for name in group])
        tensors = {
            name: tensor
            for ours in group
            for name, tensor in renamed(content, ours, read.pop(NETWORK_PREFIX + ours))
        }
        with replacing(folder / file) as partial:
            write_in_turn(tensors, tensors.__getitem__, partial, HEADER)
        file_of |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_whole(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})


def renamed(content: dict[str, Any], ours: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors: what a folder of this config.json keeps for our parameter."""
    family = content["model_type"]
    if family == OUR_MODEL_TYPE:
        yield f"model.{ours}", weight
        return
    settings, _, names = READERS[family](content)
    parts = in_their_layout(family, ours, weight, names[ours], settings)
    further = zero_expert_names(ours, names[ours], settings)
    parts += [torch.zeros_like(parts[0]) for _ in further]
    base = "transformer" if family == "gpt2" else "model"
    for name, part in zip(names[ours] + further, parts, strict=True):
        yield (name if name == "lm_head.weight" else f"{base}.{name}"), part


def write_tokenizer(folder: Path, tokenizer: Any, seq_len: int) -> None:
    with replacing(folder / "tokenizer.json") as partial:
        tokenizer.save(partial)
        sync(partial)
    end = tokenizer.end_token
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    write_whole(folder / "tokenizer_config.json", settings)


def evaluation_of(metrics: Sequence[Mapping[str, float]], step: int) -> str:
    """Return a sentence with the last validation up to a step. metrics: rows of metrics.csv, whose
    steps count from 0."""
    done = [row for row in metrics if "val/loss" in row and row["step"] < step]
    if not done:
        return "The training had not validated it."
    loss, validated = done[-1]["val/loss"], int(done[-1]["step"]) + 1
    perplexity = math.exp(loss) if loss < 700 else math.inf  # a diverged run's exceeds a float
    return (
        f"Loss on the validation split of its data after {validated:,} steps: {loss:.4f} nats a"
        f" token, a perplexity of {perplexity:.4g}."
    )


def model_card(
    config: Config, content: dict[str, Any], step: int, parameters: int, evaluation: str
) -> str:
    """Return the text of the model card. content: of config.json. parameters: their number."""
    moe = config.moe
    data = config.data
    trainer = config.trainer
    is_dense = moe.architecture == "dense"
    tags = ["scmoe"] if is_dense else ["scmoe", "mixture-of-experts"]
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    from_data = f"data.name={data.name}"
    if data.name == "hf":
        head["datasets"] = [data.path]
        from_data = f"the data set {data.path}"
    routing = ""
    if not is_dense:
        zero = f" + {moe.zero_experts} zero-computation" if moe.zero_experts else ""
        routing = (
            f" Each token goes to {moe.top_k} of {moe.num_experts}{zero} experts; none is dropped."
        )
    how = {
        "precision": trainer.precision,
        "gradient_clip": trainer.gradient_clip,
        "accumulate": trainer.accumulate,
    }
    sections = {"model": asdict(config.model), "moe": asdict(moe), "optim": asdict(config.optim)}
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        family=config.model.family,
        architecture=moe.architecture,
        parameters=parameters,
        step=step,
        steps=max_steps(config),
        batch=data.global_batch_size,
        seq_len=data.seq_len,
        data=from_data,
        moe=routing,
        install=installation(content),
        loading=loading_code(content),
        evaluation=evaluation,
        settings=yaml.safe_dump({**sections, "trainer": how, "seed": config.seed}, sort_keys=False),
    )


def installation(content: dict[str, Any]) -> str:
    """Return the command that installs what loads a folder. content: of config.json."""
    if content["model_type"] == OUR_MODEL_TYPE:
        return "pip install -e '.[hf]'  # in a checkout of scmoe, with transformers"
    return "pip install transformers"


def loading_code(content: dict[str, Any]) -> str:
    """Return the Python code that loads a folder with transformers. content: of config.json."""
    classes = ["AutoModelForCausalLM"]
    lines = [
        'folder = "."  # where this file is; or the name of the model on the Hub',
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    ]
    if content["eos_token_id"] is not None:
        classes.append("AutoTokenizer")
        lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    imports = [f"from transformers import {', '.join(classes)}", ""]
    if content["model_type"] == OUR_MODEL_TYPE:
        imports.insert(0, "import scmoe.hf  # transformers then knows the model")
    return "".join(f"{line}\n" for line in [*imports, *lines])
