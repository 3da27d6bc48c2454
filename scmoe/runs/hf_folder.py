"""Folders of Hugging Face's form: config.json, weights, tokenizer and model card.

They are written without transformers.

    config.json, generation_config.json
    model.safetensors; above SHARD_BYTES, model-00001-of-0000N.safetensors and an index
    tokenizer.json, tokenizer_config.json    of a model of text
    README.md                                the model card; an existing one stays, as it may have
                                             been edited

config.json is that of transformers' model if it has an equal one, else ours:

    dense GPT, dense LLaMA                                 gpt2, llama
    LLaMA, top-k in every block, top_k >= 2, renormalised  mixtral
    LLaMA, shared-expert, CG-1                             qwen2_moe
    LLaMA, shared-expert, latents, router deepseek         deepseek_v3
    LLaMA, ScMoE Pos-2, scaled latents, router longcat     longcat_flash
    ScMoE, DGMoE and everything else                       scmoe: the classes that `import scmoe.hf`
                                                           registers

A model is equal if its config.json, read back, gives our settings. transformers' models drop no
token, so a folder describes our model with the configuration `dropless` (decision 28).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe.config.fields import Config
from scmoe.config.load import load_text
from scmoe.config.registry import ARCHITECTURES, ROUTERS
from scmoe.files.writing import (
    read_json,
    replacing,
    sync,
    write_durably,
    write_in_turn,
    write_whole,
)
from scmoe.init_from.families import ALWAYS, KEYS, READERS, YARN, family_of
from scmoe.init_from.names import in_their_layout, zero_expert_names
from scmoe.init_from.pretrained import model_settings, settings_of, weight_files
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import NETWORK, network_in, read_named
from scmoe.training.assembly.model import build_model_on_meta

OURS = "scmoe"
NATIVE = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "longcat_flash": "LongcatFlashForCausalLM",
}
CANDIDATES = {  # model.family, model.attention, moe.architecture: the model_type that may be equal
    ("gpt", "full", "dense"): "gpt2",
    ("llama", "full", "dense"): "llama",
    ("llama", "full", "top_k"): "mixtral",
    ("llama", "full", "shared_expert"): "qwen2_moe",
    ("llama", "latent", "shared_expert"): "deepseek_v3",
    ("llama", "latent", "scmoe"): "longcat_flash",
}
SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
# The header of each file of weights. transformers reads the first entry; the second marks a file
# that an export may replace.
HEADER = {"format": "pt", "written_by": "scmoe"}

CARD = """---
{head}---

# {family}, {architecture}

A language model with {parameters:,} parameters, trained with scmoe for {step:,} of {steps:,} \
optimizer steps of {batch:,} sequences with {seq_len:,} tokens each, on {data}.{moe}

## Load it

```python
{loading}```

`scmoe.load("FOLDER")` returns the same network without transformers.

## Settings of the training

```yaml
{settings}```

## Licence and limits

No licence is set. Choose one with a line `license:` at the top. Add what the model is for and how \
it was evaluated (`make evaluate`). It was not trained to follow instructions, or to be safe.
"""


def write_folder(
    checkpoint: Path,
    folder: Path,
    config: Config,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the folder and return its model_type. Each file is complete or absent, and config.json
    comes last.

    tokenizer: of the data, or None. Raises ValueError for a checkpoint that is broken, another
    model's or no language model's, and for a folder with files that are not an export of this
    model.
    """
    content = hf_config(config, None if tokenizer is None else tokenizer.end_of_text)
    model = build_model_on_meta(config)
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
        with replacing(folder / "README.md") as partial:
            write_durably(partial, model_card(config, content, step, parameters))
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
        read = read_named(checkpoint, [NETWORK + name for name in group])
        tensors = {
            name: tensor
            for ours in group
            for name, tensor in renamed(content, ours, read.pop(NETWORK + ours))
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
    if family == OURS:
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


def dropless(config: Config) -> Config:
    """Return the configuration for one process that drops no copy of a token, so that a model's
    result does not depend on a batch."""
    moe = replace(
        config.moe, capacity_factor=None, dropless_ceiling=None, rows="auto", overflow="drop"
    )
    return replace(
        config,
        init_from=None,
        moe=moe,
        strategy=type(config.strategy)(),
        trainer=type(config.trainer)(),
    )


def hf_config(config: Config, end_of_text: int | None) -> dict[str, Any]:
    """Return the content of config.json. end_of_text: an id, or None.

    Raises ValueError if the model is no language model, or a part of it is an extension's, whose
    options config.json does not keep.
    """
    if config.model.family not in ("gpt", "llama"):
        raise ValueError(
            f"model.family is {config.model.family}, allowed with --format hf: gpt | llama"
        )
    moe = config.moe
    for key, name, names in (
        ("architecture", moe.architecture, ARCHITECTURES),
        ("router", moe.router, ROUTERS),
    ):
        if name not in names.built_in:
            raise ValueError(
                f"--format hf cannot export the model: an extension defines moe.{key}={name}. Use"
                " --format safetensors."
            )
    content = native_config(config) or scmoe_config(config)
    return {**content, "bos_token_id": end_of_text, "eos_token_id": end_of_text, "dtype": "float32"}


def native_config(config: Config) -> dict[str, Any] | None:
    """Return the config.json of transformers' equal model; None if there is none."""
    moe = config.moe
    family = CANDIDATES.get((config.model.family, config.model.attention, moe.architecture))
    # An added bias and balanced routing are not among the settings of a model.
    has_added_bias = moe.router == "softmax" and moe.bias_rate is not None
    if family is None or moe.balanced_routing or has_added_bias:
        return None
    content = their_config(family, config)
    if READERS[family](content)[1]:
        return None
    read = our_config(content, "config.json")
    is_equal = model_settings(read) == model_settings(replace(config, extensions=[]))
    return content if is_equal else None


def their_config(family: str, config: Config) -> dict[str, Any]:
    """Return a config.json of this model_type with all settings that it has keys for."""
    settings = settings_of(config)
    model = config.model
    activation = settings["model.activation"]
    content: dict[str, Any] = {"model_type": family, "architectures": [NATIVE[family]]}
    content |= {theirs: settings[ours] for ours, theirs in KEYS[family].items()}
    if family == "gpt2":
        return content | {
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": 0.0,
            "n_positions": config.data.seq_len,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new" if activation == "gelu_tanh" else activation,
        }

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.latent.yarn_factor != 1:
        rope |= {"rope_type": "yarn", "factor": model.latent.yarn_factor, **YARN}
    content |= ALWAYS[family] | {
        "max_position_embeddings": config.data.seq_len,
        "rope_parameters": rope,
        "hidden_act": "silu" if activation == "swiglu" else activation,
        "tie_word_embeddings": False,
    }
    if family == "qwen2_moe":
        width = settings["moe.ffn_dim"]
        content["moe_intermediate_size"] = width
        content["shared_expert_intermediate_size"] = width
        content["norm_topk_prob"] = config.moe.renormalise and config.moe.top_k > 1
    if family == "deepseek_v3":
        dense = config.moe.leading_dense
        content["num_key_value_heads"] = model.heads
        content["first_k_dense_replace"] = len(dense)
        content["intermediate_size"] = dense[0] if dense else settings["model.ffn_dim"]
        content["n_shared_experts"] = settings["model.ffn_dim"] // settings["moe.ffn_dim"]
        content["num_nextn_predict_layers"] = 0
    if family == "longcat_flash":
        content["num_layers"] = model.layers // 2
        content["head_dim"] = model.latent.rope_dim
    return content


def scmoe_config(config: Config) -> dict[str, Any]:
    """Return the config.json of a model that transformers does not have: sections of our
    configuration."""
    kept = dropless(config)
    return {
        "model_type": OURS,
        "architectures": ["ScMoEForCausalLM"],
        "scmoe": {
            "model": asdict(kept.model),
            "moe": asdict(kept.moe),
            "schedule": asdict(kept.schedule),
            "data": {
                "name": "synthetic",
                "vocab_size": config.data.vocab_size,
                "seq_len": config.data.seq_len,
            },
        },
        **sizes_of(config),
    }


def sizes_of(config: Config) -> dict[str, Any]:
    """Return the settings of a model of type scmoe under transformers' names, for programs that
    read them.

    With latent attention a cache has one head, whose keys are the latents.
    """
    settings = settings_of(config)
    model = config.model
    is_latent = model.attention == "latent"
    return {
        "vocab_size": config.data.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": settings["model.ffn_dim"],
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": 1 if is_latent else settings["model.kv_heads"],
        "head_dim": model.latent.kv_rank if is_latent else model.dim // model.heads,
        "max_position_embeddings": config.data.seq_len,
        "tie_word_embeddings": model.family == "gpt",
    }


def our_config(content: dict[str, Any], source: str) -> Config:
    """Return our configuration for a config.json.

    Raises ValueError if it has a setting that our models do not support.
    """
    if content.get("model_type") == OURS:
        return load_text(json.dumps(content.get("scmoe")), source)
    try:
        settings, problems, _ = READERS[family_of(content)](content)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{source} is not that of a {family_of(content)}: {error!r}") from error
    if problems:
        raise ValueError(f"{source}: {'; '.join(problems)}")
    ours = {
        "moe.architecture": "dense",
        **settings,
        "data.seq_len": content.get("n_positions") or content.get("max_position_embeddings"),
        "data.name": "synthetic",
        "moe.capacity_factor": None,
    }
    return load_text(json.dumps(ours), source)


def model_card(config: Config, content: dict[str, Any], step: int, parameters: int) -> str:
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
        steps=trainer.max_steps,
        batch=data.global_batch_size,
        seq_len=data.seq_len,
        data=from_data,
        moe=routing,
        loading=loading_code(content),
        settings=yaml.safe_dump({**sections, "trainer": how, "seed": config.seed}, sort_keys=False),
    )


def loading_code(content: dict[str, Any]) -> str:
    """Return the Python code that loads a folder with transformers. content: of config.json."""
    classes = ["AutoModelForCausalLM"]
    lines = ['model = AutoModelForCausalLM.from_pretrained("FOLDER")']
    if content["eos_token_id"] is not None:
        classes.append("AutoTokenizer")
        lines.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
    imports = [f"from transformers import {', '.join(classes)}", ""]
    if content["model_type"] == OURS:
        imports.insert(0, "import scmoe.hf  # transformers then knows the model")
    return "".join(f"{line}\n" for line in [*imports, *lines])
