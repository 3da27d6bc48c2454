"""Defines the sections of the configuration that say what is trained: model, moe and schedule."""

from dataclasses import dataclass
from typing import Literal

from scmoe.config.leaves import ABOVE_0, BELOW_1, DIM_RANGE, PIXELS, SHARE, WEIGHT, Range, option
from scmoe.config.registry import ARCHITECTURES, FAMILIES, ROUTERS


@dataclass(frozen=True)
class LatentConfig:
    q_rank: int | None = option(
        None, "rank of the queries' latent; null: queries have none", DIM_RANGE
    )
    kv_rank: int = option(
        512, "rank of the latent of keys and values, which generation keeps", DIM_RANGE
    )
    nope_dim: int = option(
        128, "features of a head's queries and keys without a position", DIM_RANGE
    )
    rope_dim: int = option(
        64,
        "features of a head's queries, and of the one key of all heads, with a position",
        DIM_RANGE,
    )
    value_dim: int = option(128, "features of a head's values", DIM_RANGE)
    scaled: bool = option(False, "multiply the latents by sqrt(dim / rank), as LongCat-Flash does")
    gated: bool = option(
        False, "multiply the heads' results by a sigmoid of the input, as Instella does"
    )
    yarn_factor: float = option(
        1.0,
        "YaRN, for texts of more than 4096 tokens: divide slow rotary angles by this; 1: off",
        Range(1, 1000),
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
        256,
        "width of the residual stream (D). swin: that of stage 1; it doubles per stage",
        DIM_RANGE,
    )
    heads: int = option(
        4,
        "attention heads; must divide dim if head_dim is null. swin: those of stage 1; they double"
        " per stage",
        DIM_RANGE,
    )
    attention: Literal["full", "latent"] = option(
        "full", "latent: multi-head latent attention, sizes in model.latent"
    )
    latent: LatentConfig = LatentConfig()
    kv_heads: int | None = option(
        None, "heads of keys and values; must divide heads; null: same as heads", DIM_RANGE
    )
    head_dim: int | None = option(
        None, "features of a head of full attention; null: dim / heads", DIM_RANGE
    )
    ffn_dim: int | None = option(None, "hidden width of every MLP (F); null: 4 x dim", DIM_RANGE)
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
        None, "hidden width of a routed expert; null: model.ffn_dim", DIM_RANGE
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
        "cg1", "how shared and routed outputs are added (Eq. 14-16); not the transfer"
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
    distinct_experts: bool = option(
        True, "DGMoE: the current layer goes to another expert than the preceding one (A.2)"
    )
    every: Literal[1, 2, 4] = option(
        2, "MoE in every block (1), in every second block (2) or in every fourth (4)"
    )
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
        "rows=buffers: copies that do not fit into a buffer are dropped and counted, or end"
        " the run before the update",
    )
    dropless_ceiling: float | None = option(
        None,
        "dropless: rows that a rank may receive, in multiples of its fair share; null: no limit",
        Range(1, 1e6),
    )
    router: str = option(
        "softmax", "scores, weights, selection bias; docs/routing.md", names=ROUTERS.names
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
        None, "backbone operators before the experts; null: the middle of the window", Range(0, 64)
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
        "overlapped",
        "sequential: wait for each transfer right after its start, the baseline of speed-ups",
    )
