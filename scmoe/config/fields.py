"""Defines the configuration: a tree of frozen dataclasses, whose fields have types, defaults, units
and ranges.

models, blocks, moe, schedule, planning, parallel, lightning and inference do not read it:
`training/assembly/` builds them from it. `model_fields.py` has the sections of what is trained,
`rules.py`, `trainer_rules.py` and `unread.py` say which values fit together, `derived.py` what
follows from them, `load.py` fills the tree from YAML and the command line, `leaves.py` walks it,
`help.py` prints it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from scmoe.config.leaves import (
    ABOVE_0,
    BELOW_1,
    COUNT,
    COUNT_OR_0,
    IDS,
    PIXELS,
    SHARE,
    WEIGHT,
    Range,
    option,
)
from scmoe.config.model_fields import ModelConfig, MoEConfig, ScheduleConfig
from scmoe.config.registry import DATASETS, OPTIMIZERS


@dataclass(frozen=True)
class DataConfig:
    name: str = option("sotu", "data set", names=DATASETS.names)
    path: str | None = option(
        None,
        "text: a file or folder; hf: name of a Hugging Face data set, or a folder of JSON lines or"
        " CSV; fashion_mnist: a folder,"
        " null: that of Debian's package; image_folder: a folder with train/CLASS and val/CLASS",
    )
    subset: str | None = option(None, "hf: configuration of the data set")
    text_field: str = option("text", "hf: field of a row that is its text")
    tokenizer: str = option(
        "bpe", "bpe: trained on the training split; gpt2; or the path of a tokenizer.json"
    )
    vocab_size: int = option(4096, "vocabulary (V); gpt2 has 50257", IDS)
    seq_len: int = option(256, "tokens per sequence (S)", IDS)
    global_batch_size: int = option(
        32, "sequences (images) per optimizer step, of all ranks together", COUNT
    )
    val_sequences: int | None = option(
        None, "sequences (images) that a validation uses; null: all", COUNT
    )
    image_size: int = option(192, "images: width and height of the model's input in pixels", PIXELS)
    num_classes: int = option(1000, "images: number of classes of the data set", Range(2, 2**24))
    augment: Literal["none", "imagenet"] = option(
        "none", "images: imagenet adds crops, flips, RandAugment, erasing"
    )
    mixup: float = option(0.0, "images: alpha of mixup; 0: no mixup", WEIGHT)
    cutmix: float = option(
        0.0, "images: alpha of cutmix; with mixup, each gets half the batches; 0: none", WEIGHT
    )
    label_smoothing: float = option(
        0.0, "images: probability that is spread over all classes", BELOW_1
    )
    workers: int = option(0, "data-loading processes per rank", Range(0, 64))
    on_error: Literal["raise", "skip"] = option(
        "raise",
        "files that cannot be read: raise an error, or skip and count them (images: take the next"
        " one)",
    )
    cache_dir: str = option(".cache", "folder of token caches and tokenizers")


@dataclass(frozen=True)
class OptimConfig:
    name: str = option(
        "adamw",
        "muon: Muon for matrices, each expert's on its own, and AdamW for others",
        names=OPTIMIZERS.names,
    )
    lr: float = option(
        1e-3,
        "peak learning rate; muon: of Muon too, whose updates are scaled to AdamW's size",
        Range(0, 1, "least"),
    )
    schedule: Literal["cosine", "wsd", "constant"] = option(
        "cosine", "learning rate after the warm-up: half a cosine; stable, then a decay; constant"
    )
    decay_steps: int | None = option(
        None, "wsd: last optimizer steps, in which the rate falls; null: a fifth of all", COUNT
    )
    min_lr_ratio: float = option(0.1, "final learning rate, as a share of the peak", SHARE)
    warmup_steps: int = option(50, "linear warm-up, in optimizer steps", COUNT_OR_0)
    weight_decay: float = option(
        0.1,
        "decay of matrices; norms, biases and embeddings have none, unless an embedding is also the"
        " output layer",
        SHARE,
    )
    beta1: float = option(0.9, "decay of AdamW's running mean of gradients", BELOW_1)
    beta2: float = option(0.95, "decay of AdamW's running mean of squared gradients", BELOW_1)
    eps: float = option(1e-8, "epsilon of AdamW, added to the root of that mean", Range(1e-16, 1))
    momentum: float = option(0.95, "muon: decay of its running mean of gradients", BELOW_1)


@dataclass(frozen=True)
class TrainerConfig:
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", "device type")
    devices: int = option(1, "processes per machine: one per GPU, or CPU ranks", COUNT)
    num_nodes: int = option(1, "number of machines", COUNT)
    max_steps: int | None = option(200, "optimizer steps; null: as trainer.max_tokens says", COUNT)
    max_tokens: int | None = option(
        None,
        "tokens to train on, with trainer.max_steps=null, up to the end of a step; of all ranks"
        " together",
        Range(1, 1e15),
    )
    accumulate: int = option(1, "batches accumulated for one optimizer step", COUNT)
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "64-true"] = option(
        "32-true", "Lightning's precision"
    )
    gradient_clip: float | None = option(
        1.0, "largest global gradient norm; null: no clipping", ABOVE_0
    )
    val_every: int = option(100, "optimizer steps between validations", COUNT)
    log_every: int = option(10, "optimizer steps between logged metrics", COUNT)
    checkpoint_every: int = option(100, "optimizer steps between checkpoints", COUNT)
    recompute: bool = option(
        False, "activation checkpointing of attention, MLPs and experts, not of routing"
    )
    compile: bool = option(False, "torch.compile each sub-layer and shared expert")
    deterministic: bool = option(False, "use deterministic algorithms only")
    threads: int | None = option(
        None, "CPU threads per process; null: CPU cores / devices", Range(1, 1024)
    )
    max_memory_gib: float | None = option(
        None,
        "limit of a rank's estimated memory in GiB, above which no run starts; null: its share of"
        " the free memory",
        ABOVE_0,
    )
    max_step_s: float = option(
        600.0,
        "limit of a step's estimated seconds, above which no run starts; docs/troubleshooting.md",
        ABOVE_0,
    )
    early_stopping: int | None = option(
        None, "end after this many validations without a new best; null: never", COUNT
    )
    save_top_k: int = option(1, "checkpoints of the best validations that are kept", COUNT_OR_0)
    limit_train_batches: int | None = option(
        None,
        "end after this many batches, with the learning rates of all max_steps; null: no limit",
        COUNT,
    )
    limit_val_batches: int | None = option(
        None,
        "batches of a validation, of all ranks together; 0: no validation; null: all",
        COUNT_OR_0,
    )
    overfit_batches: int | None = option(
        None, "train on this many first batches only, again and again; null: on all data", COUNT
    )
    fast_dev_run: bool = option(
        False, "a short trial: one step, one validation batch, metrics.csv as the only logger"
    )
    profile_steps: str | None = option(
        None, "A:B records steps A to B - 1 with torch.profiler on every rank, in traces/"
    )
    peak_tflops: float | None = option(
        None,
        "peak TFLOP/s of one device, for time/mfu; null: that of known GPUs in bf16, else no MFU",
        ABOVE_0,
    )
    extra: dict[str, Any] = option(
        {}, "more arguments of Lightning's Trainer: trainer.extra.max_time=00:01:00:00"
    )
    progress: bool = option(True, "show progress: a bar in a terminal, else a line per logged step")


@dataclass(frozen=True)
class StrategyConfig:
    ep_size: int | None = option(
        None,
        "expert-parallel ranks; null: the largest number that divides moe.num_experts and"
        " trainer.devices",
        COUNT,
    )
    timeout_s: float = option(
        300.0,
        "seconds that a collective may take, then the job ends; a start has 600 s or more",
        Range(10, 1e6),
    )
    async_checkpoint: bool = option(False, "continue training while a checkpoint is written")
    wire_dtype: Literal["bfloat16"] | None = option(
        None, "type of rows between ranks; null: that of the experts"
    )
    dense: Literal["replicated", "sharded", "hybrid", "auto"] = option(
        "replicated",
        "dense weights: on every rank; split over all ranks; split over those of a node; auto:"
        " chosen by a rank's memory",
    )


@dataclass(frozen=True)
class OffloadConfig:
    way: Literal["resident", "blocking", "determinate", "speculative"] = option(
        "resident",
        "experts while text is generated: on the device (resident), or fetched from a file;"
        " docs/inference.md",
    )
    slots: int | None = option(
        None,
        "experts on the device, of all layers together; null: twice the experts that a token needs"
        " of one layer",
        COUNT,
    )
    rate_mb_s: float | None = option(
        None, "limit of fetching, in 10^6 bytes a second; null: none", ABOVE_0
    )


@dataclass(frozen=True)
class AnalysisConfig:
    expert_load: bool = option(
        True, "keep each expert's load of logged steps in a table; draw it as a heat map"
    )
    gating_every: int | None = option(None, "optimizer steps between measurements of Fig. 9", COUNT)
    similarity_every: int | None = option(
        None, "optimizer steps between measurements of Fig. 10", COUNT
    )
    gradients_every: int | None = option(
        None, "optimizer steps between measurements of the gradient's norm by depth (Eq. 22)", COUNT
    )
    record_routing: int | None = option(
        None,
        "optimizer steps between two whose expert ids are recorded in analysis/routing/",
        COUNT,
    )


@dataclass(frozen=True)
class LoggerConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = option(
        "auto",
        "Weights & Biases; auto: as WANDB_MODE says, else online where a key is found, offline"
        " elsewhere",
    )
    tensorboard: bool = option(
        False, "log to TensorBoard too, into tensorboard/ of the run directory"
    )
    entity: str | None = option(
        None, "W&B user or team; null: as WANDB_ENTITY says, else the account's own"
    )
    project: str | None = option(None, "W&B project; null: as WANDB_PROJECT says, else scmoe")
    group: str | None = option(None, "W&B group; null: as WANDB_RUN_GROUP says")
    job_type: str | None = option(None, "W&B job type; null: as WANDB_JOB_TYPE says, else train")
    notes: str | None = option(None, "W&B notes, a text about the run; null: as WANDB_NOTES says")
    tags: list[str] = option([], "W&B tags; []: as WANDB_TAGS says")


@dataclass(frozen=True)
class Config:
    name: str = option("scmoe", "name of the experiment; runs are kept in <runs_dir>/<name>/")
    seed: int = option(1, "seed of weights, data order and dropout", Range(0, 2**32 - 1))
    runs_dir: str = option("runs", "folder of all run directories")
    extensions: list[str] = option(
        [], "modules of your own to import, which register names; docs/extending.md"
    )
    callbacks: dict[str, Any] = option(
        {}, "registered callbacks and their options: callbacks.my_callback.every=10"
    )
    options: dict[str, Any] = option({}, "settings of your extensions: options.my_option=3")
    init_from: str | None = option(
        None,
        "initial weights: hf:FOLDER (transformers) or scmoe:FILE (an export); a dense model is"
        " upcycled into MoE",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = StrategyConfig()
    offload: OffloadConfig = OffloadConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    logger: LoggerConfig = field(default_factory=LoggerConfig)
