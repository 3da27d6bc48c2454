"""Defines the configuration: a tree of frozen dataclasses, whose fields have types, defaults, units
and ranges.

`training/assembly/` is the only reader. `rules.py` says which values fit together, `load.py` fills
the tree from YAML and the command line, `leaves.py` walks it, `help.py` prints it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from scmoe.config.leaves import Range, option
from scmoe.config.registry import ARCHITECTURES, DATASETS, FAMILIES, OPTIMIZERS, ROUTERS

COUNT = Range(1, 2**31 - 1)
COUNT_OR_0 = Range(0, 2**31 - 1)
WIDTH = Range(1, 2**17)
IDS = Range(1, 2**24)
PIXELS = Range(1, 2**14)
SHARE = Range(0, 1)
BELOW_1 = Range(0, 1, "most")
WEIGHT = Range(0, 1000)
ABOVE_0 = Range(0, 1e6, "least")


@dataclass(frozen=True)
class LatentConfig:
    q_rank: int | None = option(None, "rank of the queries' latent; null: queries have none", WIDTH)
    kv_rank: int = option(
        512, "rank of the latent of keys and values, which generation keeps", WIDTH
    )
    nope_dim: int = option(128, "features of a head's queries and keys without a position", WIDTH)
    rope_dim: int = option(
        64, "features of a head's queries, and of the one key of all heads, with a position", WIDTH
    )
    value_dim: int = option(128, "features of a head's values", WIDTH)
    scaled: bool = option(False, "multiply the latents by sqrt(dim / rank), as LongCat-Flash does")
    gated: bool = option(
        False, "multiply the heads' results by a sigmoid of the input, as Instella does"
    )
    yarn_factor: float = option(
        1.0, "slow down positions for longer texts than 4096 tokens (YaRN)", Range(1, 1000)
    )


@dataclass(frozen=True)
class ModelConfig:
    family: str = option("gpt", "model family", names=FAMILIES.names)
    layers: int = option(
        4,
        "blocks; a pair is Block-MLP + Block-MoE. swin: blocks of stage 3; other stages have 2",
        Range(1, 1000),
    )
    dim: int = option(
        256, "width of the residual stream (D). swin: that of stage 1; it doubles per stage", WIDTH
    )
    heads: int = option(
        4, "attention heads; must divide dim. swin: those of stage 1; they double per stage", WIDTH
    )
    attention: Literal["full", "latent"] = option(
        "full", "latent: multi-head latent attention, sizes in model.latent"
    )
    latent: LatentConfig = LatentConfig()
    kv_heads: int | None = option(
        None, "heads of keys and values; must divide heads; null: same as heads", WIDTH
    )
    ffn_dim: int | None = option(None, "hidden width of every MLP (F); null: 4 x dim", WIDTH)
    activation: Literal["gelu", "gelu_tanh", "swiglu"] | None = option(
        None,
        "activation in MLPs and experts; gelu_tanh: as in GPT-2; null: swiglu for llama, else gelu",
    )
    norm_eps: float = option(
        1e-5, "llama: epsilon of the norms, except those of latents", Range(0, 1, "least")
    )
    rope_theta: float = option(
        10000.0, "llama: base of the angles of rotary positions (theta)", Range(1, 1e9, "least")
    )
    dropout: float = option(
        0.0, "dropout probability after each sub-layer and on the embeddings", BELOW_1
    )
    patch_size: int = option(4, "swin: width of a patch in pixels", PIXELS)
    window: int = option(
        12, "swin: width of an attention window in tokens, at most the feature map's", PIXELS
    )
    drop_path: float = option(
        0.0, "swin: stochastic depth, from 0 up to this in the last block", BELOW_1
    )


@dataclass(frozen=True)
class MoEConfig:
    architecture: str = option("scmoe", "wiring of the MoE module", names=ARCHITECTURES.names)
    num_experts: int = option(8, "routed experts of one MoE module (E)", Range(1, 2**16))
    top_k: int = option(
        1, "routed experts per token (K); swin: those of stage 3; stage 4 uses 2", Range(1, 2**16)
    )
    ffn_dim: int | None = option(
        None, "hidden width of a routed expert; null: model.ffn_dim", WIDTH
    )
    zero_experts: int = option(
        0,
        "further experts that return their input, for which nothing is sent or computed",
        Range(0, 2**16),
    )
    leading_dense: list[int] = option(
        [], "hidden widths of the MLPs of dense blocks before all others; []: none"
    )
    position: Literal["pos1", "pos2", "pos3"] = option(
        "pos2", "where ScMoE and DGMoE tap the preceding layer"
    )
    first_position: Literal["pos1", "pos2", "pos3"] | None = option(
        None,
        "position of the first MoE module only (pos1: 'L0 Pos-1' of the paper); null: as position",
    )
    combine: Literal["direct_add", "cg1", "cg2"] = option(
        "cg1", "how shared and routed outputs combine (Eq. 14-16)"
    )
    coefficient_input: Literal["current", "tap"] = option(
        "current", "what the coefficient gate reads"
    )
    tap_norm: Literal["own", "shared"] = option(
        "own", "norm of the tap; shared: that of the sub-layer after the tap"
    )
    after_norm: bool = option(
        False, "norm of the sum of shared and routed output, before it is added"
    )
    every: Literal[1, 2] = option(2, "MoE in every block (1) or in every second block (2)")
    capacity_factor: float | None = option(
        2.0, "an expert's slots over its fair share; null: dropless", ABOVE_0
    )
    rows: Literal["auto", "filled", "slots", "buffers"] = option(
        "auto",
        "rows that are sent; filled: filled slots only; slots: all slots of the capacity; buffers:"
        " dropless, a buffer of dropless_ceiling x its fair share for each rank, so that the host"
        " need not wait for the GPU (compute capability 9 or 10, bf16); auto: filled without a"
        " capacity or with trainer.accelerator=cpu, else slots",
    )
    overflow: Literal["drop", "refuse"] = option(
        "drop",
        "rows=buffers: copies that do not fit into a buffer are dropped and counted, or are an"
        " error after the step",
    )
    dropless_ceiling: float | None = option(
        None,
        "dropless: rows that a rank may receive, in multiples of its fair share; null: no limit",
        Range(1, 1e6),
    )
    router: str = option(
        "softmax", "scores, weights, selection bias; docs/routers.md", names=ROUTERS.names
    )
    router_scale: float = option(
        1.0, "factor of the routed experts' weights (gamma), times the router's own", ABOVE_0
    )
    bias_rate: float | None = option(
        None,
        "step of the selection bias, over the score of equal logits; 0: constant bias; null: the"
        " router's own step",
        SHARE,
    )
    renormalise: bool = option(
        True,
        "router=softmax, top_k >= 2: divide the kept experts' probabilities by their sum (Eq. 2)",
    )
    noisy: bool = option(False, "add noise to the gate's logits in training (Eq. 4)")
    balanced_routing: bool = option(
        False, "assign tokens to experts in turn: a bound for speed, not a model"
    )
    load_balance_coef: float = option(0.01, "weight of the load-balance loss", WEIGHT)
    z_loss_coef: float = option(0.0, "weight of the router z-loss", WEIGHT)


@dataclass(frozen=True)
class ScheduleConfig:
    auto: bool = option(
        False, "measure operators in the first steps, then choose. Short form: schedule=auto"
    )
    slot: int | None = option(
        None, "backbone operators before the experts; null: half of the window", Range(0, 64)
    )
    inside_attention: bool = option(
        False,
        "run the experts inside the attention after the slot, before its output projection; the"
        " last attention where slot is null",
    )
    chunks: int | None = option(
        None, "pipelined chunks of the MoE stream; null: 1 or auto's choice", Range(1, 1024)
    )
    batches_in_flight: Literal[1, 2] | None = option(
        None,
        "2: the halves of a rank's batch run in turns, so that one computes while the other's rows "
        "travel; a capacity counts a half's tokens; null: 1 or auto's choice",
    )
    transfers: Literal["overlapped", "sequential"] = option(
        "overlapped", "sequential: wait for each transfer at once, the baseline of speed-ups"
    )


@dataclass(frozen=True)
class DataConfig:
    name: str = option("sotu", "data set", names=DATASETS.names)
    path: str | None = option(
        None,
        "text: a file or folder; hf: name of a Hugging Face data set; fashion_mnist: a folder,"
        " null: that of Debian's package; image_folder: a folder with train/CLASS and val/CLASS",
    )
    subset: str | None = option(None, "hf: configuration of the data set")
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
    min_lr_ratio: float = option(0.1, "final learning rate, as a share of the peak", SHARE)
    warmup_steps: int = option(50, "linear warm-up, in optimizer steps", COUNT_OR_0)
    weight_decay: float = option(
        0.1, "decay of matrices; norms, biases and position embeddings have none", SHARE
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
    max_steps: int = option(200, "optimizer steps", COUNT)
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
        "limit of a step's estimated seconds, above which no run starts; docs/faults.md",
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
        None, "expert-parallel ranks; null: most that divide experts and devices", COUNT
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
    reductions: Literal["ddp", "paced"] | None = option(
        None,
        "gradients are sent when a bucket is full (ddp), or in pieces after the rows (paced); null:"
        " paced on CPUs, ddp on GPUs",
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
        " docs/offload.md",
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
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = StrategyConfig()
    offload: OffloadConfig = OffloadConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    logger: LoggerConfig = field(default_factory=LoggerConfig)
