"""The configuration: one tree of frozen dataclasses, filled from YAML and the command line.

Every field of an experiment stands here with its type, default, unit and allowed values; `training/build.py`
and `training/build_model.py` are the only readers. A YAML may name other files of the same tree under `extends:`,
relative to itself. From weak to strong: defaults, the extended files in their order, the file, the command line.

A file holds texts, and the field's type decides what a text means: `1e-3` is a number in optim.lr and a text in a name.
So no file can name an object to build, and nothing is interpolated. Which values fit together is in `config_check.py`,
what `--help` and `make list` show in `config_help.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from scmoe.config_check import ConfigError, leaves, show, validate
from scmoe.config_yaml import parse_yaml


def option(default: Any, help: str, range: str | None = None) -> Any:
    """A field with its default, the line that `--help` shows, and the name of its range in config_check.RANGES."""
    return field(default=default, metadata={"help": help, "range": range})


@dataclass(frozen=True)
class ModelConfig:
    family: Literal["gpt", "llama", "swin"] = option("gpt", "model family")
    layers: int = option(
        4, "Transformer blocks; a pair is Block-MLP + Block-MoE. swin: of stage 3, the other stages have 2", "above 0"
    )
    dim: int = option(256, "width of the residual stream (D); swin: of stage 1, it doubles with each stage", "above 0")
    heads: int = option(4, "attention heads; must divide dim. swin: of stage 1, they double, too", "above 0")
    kv_heads: int | None = option(None, "heads of keys and values; must divide heads; null: heads", "above 0")
    ffn_dim: int | None = option(None, "hidden width of every MLP and expert (F); null: 4 x dim", "above 0")
    activation: Literal["gelu", "gelu_tanh", "swiglu"] | None = option(
        None, "inside MLPs and experts; gelu_tanh is GPT-2's own; null: swiglu for llama, else gelu"
    )
    dropout: float = option(0.0, "dropout probability after each sub-layer and on the embeddings", "0 or more, below 1")
    patch_size: int = option(4, "swin: width of a patch in pixels", "above 0")
    window: int = option(12, "swin: width of an attention window in tokens; at most the whole feature map", "above 0")
    drop_path: float = option(0.0, "swin: stochastic depth of the last block; it grows from 0", "0 or more, below 1")


@dataclass(frozen=True)
class MoEConfig:
    architecture: Literal["dense", "top_k", "shared_expert", "scmoe", "dgmoe", "dgmoe_share"] = option(
        "scmoe", "wiring of the MoE module"
    )
    num_experts: int = option(8, "routed experts of one MoE module (E)", "above 0")
    top_k: int = option(1, "routed experts per token (K); swin: in stage 3, stage 4 has 2", "above 0")
    position: Literal["pos1", "pos2", "pos3"] = option("pos2", "where ScMoE and DGMoE tap the preceding layer")
    first_position: Literal["pos1", "pos2", "pos3"] | None = option(
        None, "tap of the first MoE module only (pos1: the paper's 'L0 Pos-1'); null: as position"
    )
    combine: Literal["direct_add", "cg1", "cg2"] = option("cg1", "how shared and routed outputs are merged (Eq. 14-16)")
    coefficient_input: Literal["current", "tap"] = option("current", "what the coefficient gate reads")
    tap_norm: Literal["own", "shared"] = option("own", "norm of the tap; shared: that of the sub-layer after the tap")
    every: Literal[1, 2] = option(2, "MoE in every block (1) or in every second block (2)")
    capacity_factor: float | None = option(2.0, "slots per expert over its fair share; null: dropless", "above 0")
    dropless_ceiling: float | None = option(
        None, "dropless: rows that a rank may receive, over its fair share; null: any number", "1 or more"
    )
    renormalise: bool = option(True, "top_k >= 2: divide the kept experts' probabilities by their sum (Eq. 2)")
    noisy: bool = option(False, "noise on the gate's logits in training (Eq. 4)")
    balanced_routing: bool = option(
        False, "ignore the gate and deal tokens round-robin: a bound for speed, not a model"
    )
    load_balance_coef: float = option(0.01, "weight of the load-balance loss", "0 or more")
    z_loss_coef: float = option(0.0, "weight of the router z-loss", "0 or more")


@dataclass(frozen=True)
class ScheduleConfig:
    auto: bool = option(
        False, "measure the operators in the first steps and choose; the same as `schedule: auto` for the section"
    )
    slot: int | None = option(
        None, "backbone operators before the experts; null: the middle of the window", "0 or more"
    )
    chunks: int | None = option(
        None, "pieces that the MoE stream's rows are cut into (pipelining); null: 1, or of auto's choice", "above 0"
    )


@dataclass(frozen=True)
class DataConfig:
    name: Literal["sotu", "text", "hf", "synthetic", "fashion_mnist", "digits", "image_folder"] = option(
        "sotu", "data set"
    )
    path: str | None = option(
        None,
        "text: a file or folder; hf: name of a Hugging Face data set; fashion_mnist: a folder, null: where Debian's "
        "package puts it; image_folder: has train/CLASS and val/CLASS",
    )
    subset: str | None = option(None, "hf: configuration of the data set")
    tokenizer: str = option("bpe", "bpe: trained on the training split; gpt2; or the path of a tokenizer.json")
    vocab_size: int = option(4096, "vocabulary (V); gpt2 has 50257", "above 0")
    seq_len: int = option(256, "tokens per sequence (S)", "above 0")
    global_batch_size: int = option(
        32, "sequences (images) per optimizer step, over all ranks and accumulated batches", "above 0"
    )
    val_sequences: int | None = option(None, "sequences (images) of a validation; null: all", "above 0")
    image_size: int = option(192, "images: width and height in pixels that the model sees", "above 0")
    num_classes: int = option(1000, "images: classes of the data set", "above 0")
    augment: Literal["none", "imagenet"] = option("none", "images: imagenet: crops, flips, RandAugment, erasing")
    mixup: float = option(0.0, "images: alpha of mixup; 0: none", "0 or more")
    cutmix: float = option(0.0, "images: alpha of cutmix, taken half the time where mixup is on; 0: none", "0 or more")
    label_smoothing: float = option(0.0, "images: share of a label given to all classes", "0 or more, below 1")
    workers: int = option(0, "data-loading processes per rank", "0 or more")
    cache_dir: str = option(".cache", "where token caches and tokenizers are kept")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = option(1e-3, "peak learning rate of AdamW", "above 0")
    min_lr_ratio: float = option(0.1, "last learning rate over peak", "0 to 1")
    warmup_steps: int = option(50, "linear warm-up, in optimizer steps", "0 or more")
    weight_decay: float = option(0.1, "on matrices only; never on norms, biases and embeddings' positions", "0 or more")
    beta1: float = option(0.9, "decay of AdamW's mean of gradients", "0 or more, below 1")
    beta2: float = option(0.95, "decay of AdamW's mean of squared gradients", "0 or more, below 1")
    eps: float = option(1e-8, "added to the root of the latter", "above 0")


@dataclass(frozen=True)
class TrainerConfig:
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "where to run")
    devices: int = option(1, "processes on this machine (one per GPU, or CPU ranks)", "above 0")
    num_nodes: int = option(1, "machines", "above 0")
    max_steps: int = option(200, "optimizer steps", "above 0")
    accumulate: int = option(1, "batches accumulated for one optimizer step", "above 0")
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "64-true"] = option("32-true", "Lightning precision")
    gradient_clip: float | None = option(1.0, "global gradient norm; null: no clipping", "above 0")
    val_every: int = option(100, "optimizer steps between validations", "above 0")
    log_every: int = option(10, "optimizer steps between logged metrics", "above 0")
    checkpoint_every: int = option(100, "optimizer steps between checkpoints", "above 0")
    recompute: bool = option(False, "activation checkpointing of attention, MLPs and experts; routing is kept")
    compile: bool = option(False, "torch.compile each block")
    deterministic: bool = option(False, "deterministic algorithms only")
    threads: int | None = option(None, "CPU threads per process; null: cores / devices", "above 0")
    progress: bool = option(True, "rich progress bar")


@dataclass(frozen=True)
class StrategyConfig:
    ep_size: int | None = option(
        None, "expert-parallel ranks; null: the most that divide both experts and devices", "above 0"
    )
    timeout_s: float = option(300.0, "seconds a collective may take before the job is ended", "above 0")
    async_checkpoint: bool = option(False, "go on training while a checkpoint is written")
    full_checkpoint: bool = option(False, "one file for the tensors of all ranks, put together by rank 0")
    wire_dtype: Literal["bfloat16"] | None = option(
        None, "type in which rows travel between ranks; null: that in which experts compute"
    )
    debug_collectives: bool = option(False, "compare every collective over ranks before it is done; slow")


@dataclass(frozen=True)
class AnalysisConfig:
    gating_every: int | None = option(None, "optimizer steps between measurements of Fig. 9; null: none", "above 0")
    similarity_every: int | None = option(
        None, "optimizer steps between measurements of Fig. 10; null: none", "above 0"
    )


@dataclass(frozen=True)
class LoggerConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "Weights & Biases; auto: online where a key is found, offline elsewhere"
    )
    project: str = option("scmoe", "W&B project")
    group: str | None = option(None, "W&B group")
    tags: list[str] = field(default_factory=list, metadata={"help": "W&B tags"})


@dataclass(frozen=True)
class Config:
    name: str = option("scmoe", "experiment; runs are kept in runs/<name>/")
    seed: int = option(1, "seed of weights, data order and dropout", "0 to 2^32 - 1")
    runs_dir: str = option("runs", "root of all run directories")
    init_from: str | None = option(
        None, "weights to begin with: hf:FOLDER (transformers) or scmoe:FILE (make export); dense into MoE: upcycled"
    )
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    strategy: StrategyConfig = StrategyConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    logger: LoggerConfig = field(default_factory=LoggerConfig)


_LEAVES = {leaf.key: leaf for leaf in leaves(Config())}
_SECTIONS = {key.rpartition(".")[0] for key in _LEAVES if "." in key}
_NULL = ("", "~", "null", "None")


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a YAML file and overrides `key=value` or `--key=value`.

    path: None for the defaults alone.
    Raises ConfigError, in one line, for whatever cannot be read, has no such key, does not fit its type or cannot run.
    """
    tree = OmegaConf.structured(Config)
    for section in _SECTIONS:  # OmegaConf makes a frozen dataclass read-only
        OmegaConf.set_readonly(OmegaConf.select(tree, section), False)
    OmegaConf.set_readonly(tree, False)
    if path is not None:
        _merge_file(tree, Path(path), ())
    for override in overrides:
        _merge_override(tree, override)
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    sources = [str(path)] * (path is not None) + ["command line"] * bool(overrides)
    validate(config, " and ".join(sources) or "defaults")
    return config


def to_yaml(config: Config) -> str:
    """Every field; `load` makes an equal Config of it."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """Every value under its dotted key, as a logger wants it."""
    return {leaf.key: leaf.value for leaf in leaves(config)}


def resolve_ep_size(config: Config) -> int:
    """Expert-parallel ranks: as configured, else the most that share the experts evenly within one machine."""
    if config.strategy.ep_size is not None:
        return config.strategy.ep_size
    if config.moe.architecture == "dense":
        return 1
    return math.gcd(config.moe.num_experts, config.trainer.devices)


def _merge_file(tree: DictConfig, path: Path, children: tuple[Path, ...]) -> None:
    """Merge the files that a file extends, then the file. children: the files on whose behalf it is read."""
    try:
        text, identity = path.read_text(encoding="utf-8"), path.resolve()
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, a path with a null byte
        asked = f", which {children[-1]} extends" if children else ""
        raise ConfigError(f"{path}{asked}: not a file that can be read: {error}") from error
    if identity in children:
        raise ConfigError(f"{path}: extends itself: {' > '.join(map(str, (*children, identity)))}")
    mapping = parse_yaml(text, str(path)) or {}  # an empty file is an empty mapping
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: the file is {show(mapping)}, allowed: a mapping of keys to values")
    extends = mapping.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise ConfigError(f"{path}: extends is {show(extends)}, allowed: a path or a list of paths")
    for parent in parents:
        _merge_file(tree, path.parent / parent, (*children, identity))
    _merge(tree, mapping, str(path))


def _merge_override(tree: DictConfig, override: str) -> None:
    key, equals, text = override.removeprefix("--").partition("=")
    if not equals:
        raise ConfigError(f"command line: {override!r} has no value, allowed: key=value or --key=value")
    _merge(tree, {key: parse_yaml(text, f"command line: {key}")}, "command line")


def _merge(tree: DictConfig, mapping: dict[str, Any], source: str) -> None:
    seen: set[str] = set()
    for key, value in _pairs(mapping):
        if key in seen:  # a section written out and a dotted key beside it
            raise ConfigError(f"{source}: {key} comes twice")
        seen.add(key)
        if (key, value) == ("schedule", "auto"):
            key, value = "schedule.auto", "true"
        if key in _SECTIONS:
            raise ConfigError(f"{source}: {key} is {show(value)}, allowed: a mapping of keys to values")
        if key not in _LEAVES:
            raise ConfigError(f"{source}: unknown key {show(key)}, {_hint(key)}")
        leaf = _LEAVES[key]
        refusal = f"{source}: {key} is {show(value)}, allowed: {leaf.allowed}"
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise ConfigError(refusal)
        if any("${" in text or text == "???" for text in texts):  # OmegaConf's own language
            raise ConfigError(refusal + "; no interpolation")
        if isinstance(value, str):
            if leaf.type is bool and value.lower() not in ("true", "false"):  # OmegaConf takes any number for true
                raise ConfigError(refusal)
            choices = {str(choice): choice for choice in leaf.choices}
            value = None if value in _NULL else choices.get(value, value)
        try:
            OmegaConf.update(tree, key, value, merge=False)
        except ValidationError as error:
            raise ConfigError(refusal) from error


def _pairs(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; an empty section has none."""
    for key, value in mapping.items():
        if isinstance(value, dict) and (value or prefix + key in _SECTIONS):
            yield from _pairs(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _hint(key: str) -> str:
    """The known key that was likely meant: the field in its right section, else one spelled alike."""
    by_name = {known.rpartition(".")[2]: known for known in reversed(_LEAVES)}
    name = key.rpartition(".")[2]
    near = [by_name[name]] if name in by_name else get_close_matches(key, _LEAVES, 1)
    near = near or [by_name[match] for match in get_close_matches(name, by_name, 1)]
    return f"did you mean {near[0]}?" if near else "see --help for all keys"
