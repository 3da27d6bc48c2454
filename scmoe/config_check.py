"""What a configuration may be: the range of each number, and the combinations that cannot run.

Everything is refused here, before a process starts or a file is written, with one line that names the key.
Left out: what only the machine can tell (are there as many GPUs, does the data exist); that is said where it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from itertools import chain
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from scmoe.config import Config

# The key is what a message or --help says.
RANGES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda x: x > 0,
    "0 or more": lambda x: x >= 0,
    "1 or more": lambda x: x >= 1,
    "0 to 1": lambda x: 0 <= x <= 1,
    "0 or more, below 1": lambda x: 0 <= x < 1,
    "0 to 2^32 - 1": lambda x: 0 <= x < 2**32,  # what NumPy and so Lightning take as a seed
}
# Operators that the experts can hide behind: lengths of schedule.plan.WINDOWS, a room below; a test compares them.
WINDOW_LENGTHS = {"pos1": 2, "pos2": 3, "pos3": 4, "shared_expert": 1, "top_k": 0}

SMALLEST_VOCABULARY = {"bpe": 257, "gpt2": 50257}  # bpe: all bytes and the end of a text
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # file systems take 255 bytes

# A value that has no place, and what may stand there instead.
Refusal = tuple[str, str]


class ConfigError(ValueError):
    """One line: where, which key, what came, what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Leaf(NamedTuple):
    """One field of the tree, with the value it has there."""

    key: str
    type: Any
    value: Any
    help: str
    range: str | None

    @property
    def types(self) -> tuple[Any, ...]:
        """The alternatives of the type: (int, NoneType) for `int | null`."""
        return get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal, null left out; () for any other type."""
        return tuple(choice for kind in self.types if get_origin(kind) is Literal for choice in get_args(kind))

    @property
    def allowed(self) -> str:
        """Type and range in words: `int | null, above 0`."""
        words: list[str] = []
        for kind in self.types:
            if get_origin(kind) is Literal:
                words += map(str, get_args(kind))
            elif get_origin(kind) is list:
                words += [str(kind)]
            else:
                words += [{bool: "true | false", type(None): "null"}.get(kind, kind.__name__)]
        return " | ".join(words) + (f", {self.range}" if self.range else "")


def leaves(tree: Any, prefix: str = "") -> Iterator[Leaf]:
    """All fields of a tree of dataclasses under their dotted keys, in the order in which they are written."""
    types = get_type_hints(type(tree))
    for field in fields(tree):
        key, value = prefix + field.name, getattr(tree, field.name)
        if is_dataclass(value):
            yield from leaves(value, key + ".")
        else:
            yield Leaf(key, types[field.name], value, field.metadata["help"], field.metadata.get("range"))


def validate(config: Config, source: str = "config") -> None:
    """Refuse what cannot run.

    source: where the configuration came from, for the message.
    Raises ConfigError for the first value or combination that is out of place.
    """
    values = {leaf.key: leaf.value for leaf in leaves(config)}
    checks = (_ranges, _names, _model, _moe, _schedule, _ranks, _data)
    for key, allowed in chain.from_iterable(check(config) for check in checks):
        raise ConfigError(f"{source}: {key} is {show(values[key])}, allowed: {allowed}")


def show(value: Any) -> str:
    """A value as it would be typed, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _ranges(config: Config) -> Iterator[Refusal]:
    for leaf in leaves(config):
        finite = not isinstance(leaf.value, float) or math.isfinite(leaf.value)
        in_range = leaf.range is None or leaf.value is None or RANGES[leaf.range](leaf.value)
        if not (finite and in_range):
            yield leaf.key, leaf.allowed


def _names(config: Config) -> Iterator[Refusal]:
    if not NAME.fullmatch(config.name):  # it becomes a folder below runs_dir, and must stay there
        yield "name", "letters, digits, '.', '_' and '-', a letter or digit first, at most 100 in all"


def _model(config: Config) -> Iterator[Refusal]:
    model = config.model
    if model.dim % model.heads:
        yield "model.dim", f"a multiple of model.heads, {model.heads}"


def _moe(config: Config) -> Iterator[Refusal]:
    moe = config.moe
    if moe.dropless_ceiling is not None and (moe.architecture == "dense" or moe.capacity_factor is not None):
        yield "moe.dropless_ceiling", "null, except for experts with moe.capacity_factor=null"
    if moe.architecture != "scmoe":
        if moe.first_position is not None:
            yield "moe.first_position", f"null, as moe.architecture={moe.architecture} has no shortcut"
        if moe.tap_norm != "own":
            yield "moe.tap_norm", f"own, as moe.architecture={moe.architecture} has no tap"
        if moe.coefficient_input != "current":
            yield "moe.coefficient_input", f"current, as moe.architecture={moe.architecture} has no tap"
    if moe.combine == "direct_add" and moe.coefficient_input != "current":
        yield "moe.coefficient_input", "current, as moe.combine=direct_add has no coefficients"
    if moe.architecture in ("dense", "top_k") and moe.combine != "cg1":
        yield "moe.combine", f"left at cg1, as moe.architecture={moe.architecture} has no shared expert to combine"
    if moe.architecture == "dense":
        return
    if moe.top_k > moe.num_experts:
        yield "moe.top_k", f"at most moe.num_experts, {moe.num_experts}"
    if config.model.layers % moe.every:
        yield "model.layers", f"a multiple of moe.every, {moe.every}"
    if moe.architecture == "scmoe" and moe.every == 1:
        # With MoE in every block there is no Block-MLP: the tap is the block's own input.
        if moe.position != "pos1":
            yield "moe.position", "pos1 where moe.every=1"
        if moe.first_position not in (None, "pos1"):
            yield "moe.first_position", "pos1 | null where moe.every=1"


def _schedule(config: Config) -> Iterator[Refusal]:
    moe, schedule = config.moe, config.schedule
    if moe.architecture == "dense":
        if schedule.expert_slot is not None:
            yield "schedule.expert_slot", "null, as moe.architecture=dense has no experts"
        if schedule.chunks > 1:
            yield "schedule.chunks", "1, as moe.architecture=dense has no MoE stream"
    elif schedule.expert_slot is not None:
        scmoe = moe.architecture == "scmoe"
        for window in (moe.position, moe.first_position or moe.position) if scmoe else (moe.architecture,):
            if schedule.expert_slot > WINDOW_LENGTHS[window]:
                yield "schedule.expert_slot", f"0 to {WINDOW_LENGTHS[window]} for {window}"


def _ranks(config: Config) -> Iterator[Refusal]:
    ep_size, trainer, batch = config.strategy.ep_size, config.trainer, config.data.global_batch_size
    world = trainer.devices * trainer.num_nodes
    if ep_size is not None:
        if config.moe.architecture == "dense" and ep_size > 1:
            yield "strategy.ep_size", "1 or null, as moe.architecture=dense has no experts"
        if config.moe.architecture != "dense" and config.moe.num_experts % ep_size:
            yield "strategy.ep_size", f"a divisor of moe.num_experts, {config.moe.num_experts}"
        if world % ep_size:
            yield "strategy.ep_size", f"a divisor of trainer.devices x trainer.num_nodes, {world}"
    if batch % (world * trainer.accumulate):
        parts = "trainer.devices x trainer.num_nodes x trainer.accumulate"
        yield "data.global_batch_size", f"a multiple of {parts}, {world * trainer.accumulate}"


def _data(config: Config) -> Iterator[Refusal]:
    data = config.data
    if data.name in ("text", "hf") and data.path is None:
        yield "data.path", f"a path, as data.name={data.name} reads from it"
    if data.name in ("sotu", "synthetic") and data.path is not None:
        yield "data.path", f"null, as data.name={data.name} reads no path"
    if data.name != "hf" and data.subset is not None:
        yield "data.subset", f"null, as data.name={data.name} has no subsets"
    smallest = SMALLEST_VOCABULARY.get(data.tokenizer, 1)
    if data.name != "synthetic" and data.vocab_size < smallest:
        yield "data.vocab_size", f"{smallest} or more for data.tokenizer={data.tokenizer}"
