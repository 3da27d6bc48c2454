"""The options of `bench overlap` and `bench inference`, and the setting that they ask for.

Nothing here imports torch, so the command line reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

from cyclopts import Parameter, validators

from experiments.bench.pairs import Setting, tokens_for, usual_rows
from scmoe.command_line import OneEach
from scmoe.config.leaves import ConfigError

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Positive = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Share = Annotated[float, Parameter(validator=validators.Number(gt=0, lt=1))]
# of rounds quartiles are taken
Rounds = Annotated[int, Parameter(validator=validators.Number(gte=2))]
Compute = Literal["real", "emulated"]
Value = TypeVar("Value")
GENERATED_TOKENS = 256


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """What was asked for; None: the default of the level or of the device.

    Args:
        share: communication share of sequential top-2, forward (default: 0.52)
        ranks: ranks that exchange rows (default: 2; on cuda 1)
        compute: real operators, or emulated ones that sleep (default: emulated; on cuda real)
        device: cuda: one GPU, rows over its bus
        dim: model width (default: 512; at level iteration 256)
        ffn_dim: hidden width (default: 4 times --dim)
        heads: attention heads (default: 8; at level iteration 4)
        tokens: of one rank in one batch (default: 1024; at level iteration as --rows-per-gradient)
        rows_per_gradient: bytes of rows that a rank sends in a step of top-2, for each byte of
            gradients; the tokens of a batch follow from it (default: 3)
        accumulate: batches of a step, whose gradients are summed once (default: 1)
        layers: blocks of a row (default: 2; at level iteration 4)
        rows: rows to measure (default: all with one batch in flight). NAME_two: with two batches in
            flight; NAME_two_pipelined: in two chunks too
        load: uneven routing, measured beside the balanced one; each --load is one more. Forms
            (scmoe/loads.py): zipf:A, hot_rank:X, rotating:X:N, ragged:X, recorded:FILE; A is
            an exponent, X a multiple of the mean, N a number of steps
        link_mbit: rate of the links; by default it is searched for the share
        level: block: one pair of blocks; iteration: a training step of two pairs, with sums of
            gradients and AdamW
        every: 2: an MoE in every second block; 1: in every block
        rounds: how often each variant is measured
        tries: steps in which `schedule=auto` tries its candidates for a row, at most, but one for
            each (default: as in a training, 48); fewer shorten a series of measurements
        seq_len: tokens of a sequence
        num_experts: routed experts of an MoE module
        top_k: routed experts of a token, except in rows whose name says it, such as top2
        layout: dropless | capacity:F | buffers:C (default: capacity:1, and dropless with --load)
        attention_ms: time of an emulated attention (default: 45)
        attention_to_mlp: that time over the time of an emulated MLP (default: 3)
    """

    share: float | None = None
    ranks: Count | None = None
    compute: Compute | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dim: Count | None = None
    ffn_dim: Count | None = None
    heads: Count | None = None
    tokens: Count | None = None
    rows_per_gradient: Positive | None = None
    accumulate: Count | None = None
    layers: Count | None = None
    rows: list[str] | None = None
    load: OneEach[str] = ()
    link_mbit: Positive | None = None
    level: Literal["block", "iteration"] = "block"
    every: Literal[1, 2] = 2
    rounds: Rounds = 9
    tries: Count | None = None
    seq_len: Count = 256
    num_experts: Count = 8
    top_k: Count = 1
    attention_ms: Positive | None = None
    attention_to_mlp: Positive | None = None
    layout: str | None = None

    def setting(self) -> Setting:
        """Return what is measured. ConfigError: options that contradict each other."""
        usual = Setting.iteration() if self.level == "iteration" else Setting.block()
        if self.device == "cuda":
            usual = usual.on_gpu()
        compute = or_usual(self.compute, usual.compute)
        self.refuse_contradictions(compute)

        dim = or_usual(self.dim, usual.dim)
        setting = replace(
            usual,
            share=or_usual(self.share, usual.share),
            link_mbit=self.link_mbit,
            ranks=or_usual(self.ranks, usual.ranks),
            compute=compute,
            every=self.every,
            rounds=self.rounds,
            tries=self.tries,
            dim=dim,
            ffn_dim=or_usual(self.ffn_dim, 4 * dim),
            heads=or_usual(self.heads, usual.heads),
            tokens=or_usual(self.tokens, usual.tokens),
            seq_len=self.seq_len,
            accumulate=or_usual(self.accumulate, usual.accumulate),
            asked_layers=self.layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            attention_ms=or_usual(self.attention_ms, usual.attention_ms),
            attention_to_mlp=or_usual(self.attention_to_mlp, usual.attention_to_mlp),
            rows=without_repeats(self.rows or usual_rows(self.every)),
            loads=without_repeats(self.load),
            layout=self.layout,
        )
        if self.tokens is not None:
            return replace(setting, rows_per_gradient=None)
        if setting.rows_per_gradient is None:
            return setting
        ratio = or_usual(self.rows_per_gradient, setting.rows_per_gradient)
        return replace(setting, tokens=tokens_for(ratio, setting), rows_per_gradient=ratio)

    def refuse_contradictions(self, compute: str) -> None:
        """Raise ConfigError for options that exclude each other or change nothing."""
        if self.share is not None and self.link_mbit is not None:
            raise ConfigError(
                "--share and --link-mbit exclude each other: the rate is searched for the share,"
                " or given"
            )
        if self.rows_per_gradient is not None and self.tokens is not None:
            raise ConfigError(
                "--rows-per-gradient and --tokens exclude each other: the tokens are found, or"
                " given"
            )
        if self.level != "iteration":
            self.refuse(
                f"belongs to --level iteration, and --level is {self.level}",
                {"--rows-per-gradient": self.rows_per_gradient, "--accumulate": self.accumulate},
            )
        if compute == "emulated":
            # an iteration has the gradients of its MLPs
            ffn_dim = None if self.level == "iteration" else self.ffn_dim
            self.refuse(
                "belongs to real compute, and --compute is emulated",
                {"--heads": self.heads, "--ffn-dim": ffn_dim},
            )
        else:
            self.refuse(
                f"belongs to emulated compute, and --compute is {compute}",
                {"--attention-ms": self.attention_ms, "--attention-to-mlp": self.attention_to_mlp},
            )

    @staticmethod
    def refuse(reason: str, options: dict[str, object]) -> None:
        """Raise ConfigError if one of the options was given. options: values by name."""
        for name, value in options.items():
            if value is not None:
                raise ConfigError(f"{name} {reason}")


def or_usual(value: Value | None, usual: Value) -> Value:
    """Return the value that was given, else the usual one."""
    return usual if value is None else value


def without_repeats(names: Sequence[str]) -> tuple[str, ...]:
    """Return each name once, in their order."""
    return tuple(dict.fromkeys(names))


@Parameter(name="*")
@dataclass(frozen=True)
class InferenceOptions:
    """What `bench inference` was asked for.

    Args:
        share: communication share of a sequential top-2 prefill
        prompt: tokens of a prompt in prefill
        texts: prompts of a rank in prefill; of two or more, each architecture is measured with two
            batches in flight too (NAME_two)
        batch: texts of a rank in decode
        tokens: new tokens of each text of the generation (default: 256; with --load it is not
            measured, as routing between ranks does not change it)
        load: uneven routing (its forms: bench overlap --help), measured beside the balanced one;
            each --load is one more
    """

    share: Share = 0.52
    ranks: int = 2
    prompt: int = 512
    texts: Count = 1
    batch: int = 8
    tokens: Annotated[int, Parameter(validator=validators.Number(gte=2))] | None = None
    rounds: Rounds = 9
    load: OneEach[str] = ()

    def __post_init__(self) -> None:
        if self.load and self.tokens is not None:
            raise ConfigError("--tokens and --load exclude each other: a load has no generation")

    @property
    def new_tokens(self) -> int:
        """Return the new tokens of each text of the generation; 0: it is not measured."""
        return 0 if self.load else self.tokens or GENERATED_TOKENS

    def setting(self) -> Setting:
        """Return the setting of the prefill."""
        return Setting(
            self.share,
            ranks=self.ranks,
            compute="real",
            rounds=self.rounds,
            tokens=self.texts * self.prompt,
            seq_len=self.prompt,
            loads=tuple(dict.fromkeys(self.load)),
            layout="dropless",
        )
