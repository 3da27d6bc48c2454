"""A cluster as numbers: rates of a rank and its links, and what the software makes of them.

configs/cluster/NAME.yaml has ranks, ranks_per_node, precision, and a value with its source for each
of KEYS. Optional: keys with a default or in OPTIONAL; links.network on one node:

    peak_tflops: {value: 165, source: datasheet}

gb_s of a link is 10^9 bytes a second of one rank in one direction: a network card of 400 Gbit/s for
each rank is 50. Sources say what to check first, and are printed with an advice:

    datasheet    what the vendor prints; `attained` is the share of it that is reached
    measured     on this machine, by `cluster=measure`, or in a public measurement
    guess        not measured
    given        on the command line, or set by `cluster=measure`
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from scmoe.config.leaves import ConfigError, show
from scmoe.config.load import SHIPPED, find, mapping_of, parse_yaml, read_text
from scmoe.predict.cluster_rates import Link, Machine

SOURCES = ("datasheet", "guess", "measured")
KERNELS = ("eager", "fused")
Precision = Literal["bf16-mixed", "bf16-true", "32-true"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
NETWORK = "links.network."


class Allowed(NamedTuple):
    """Which numbers a key may have, what it means, and the value of a file without the key; None:
    the file must have it."""

    low: float
    high: float
    meaning: str
    default: float | None = None


KEYS = {
    "peak_tflops": Allowed(1e-6, 1e6, "10^12 FLOP/s of a rank's device, dense, at the precision"),
    "attained": Allowed(0.001, 1.0, "share of peak_tflops that products attain"),
    "memory_gb_s": Allowed(1e-3, 1e6, "10^9 B/s of the device's memory"),
    "links.node.gb_s": Allowed(1e-6, 1e5, "10^9 B/s of a rank in its node, one direction"),
    "links.node.attained": Allowed(0.001, 1.0, "share of gb_s that an exchange attains"),
    "links.node.latency_us": Allowed(0.0, 1e7, "microseconds of an exchange in a node, at 0 bytes"),
    "links.network.gb_s": Allowed(
        1e-6, 125.0, "10^9 B/s of a rank between nodes, one direction: Gbit/s over 8"
    ),
    "links.network.attained": Allowed(0.001, 1.0, "share of gb_s that an exchange attains"),
    "links.network.latency_us": Allowed(
        0.0, 1e7, "microseconds of an exchange between nodes, at 0 bytes"
    ),
    "peer_us": Allowed(0.0, 1e5, "microseconds of an exchange for each other rank", 0.0),
    "launch_us": Allowed(0.0, 1e5, "microseconds that the device waits for each kernel", 0.0),
    "attention": Allowed(0.01, 100.0, "time of attention over that of its products and bytes", 1.0),
    "moe": Allowed(0.0, 100.0, "time of a module's gate and layout, over an MLP's, for any k", 0.0),
    "copy": Allowed(0.0, 100.0, "the same for each routed copy of a token", 0.0),
    "tax": Allowed(0.0, 1.0, "what computation loses of the time of a transfer beside it", 0.0),
    "halves": Allowed(1.0, 10.0, "time of computing in two halves over that in one piece", 1.0),
    "fixed_ms": Allowed(
        0.0, 1e5, "milliseconds of a block with an MoE and a batch that the host adds", 0.0
    ),
    "other_ms": Allowed(0.0, 1e8, "milliseconds of a step that no operator explains", 0.0),
}


OPTIONAL = {
    "memory_gb": Allowed(1e-3, 1e6, "10^9 B of the device's memory that a rank may use"),
    "padding": Allowed(1.0, 100.0, "rows that are sent and computed, over those that are routed"),
}


class Value(NamedTuple):
    """A number and where it is from: one of SOURCES, or `given`."""

    value: float
    source: str


@dataclass(frozen=True)
class Profile:
    """A cluster with the sources of its values.

    kernels: fused: what runs between two products is one kernel, and weights are not cast for each
    batch, as in tuned stacks. padding: rows that are sent and computed, over those that are routed;
    None: as many as the config's capacity gives. memory_gb: None: not known.
    """

    name: str
    precision: Precision
    ranks: int
    ranks_per_node: int
    values: Mapping[str, Value]
    kernels: str = "eager"
    padding: float | None = None
    memory_gb: float | None = None

    @property
    def memory(self) -> float | None:
        """Return the bytes that a rank may use."""
        return None if self.memory_gb is None else self.memory_gb * 1e9

    @property
    def guesses(self) -> list[str]:
        return [key for key, value in self.values.items() if value.source == "guess"]

    def machine(self) -> Machine:
        """Return the cluster's numbers."""
        numbers = {key: value.value for key, value in self.values.items()}
        return Machine(
            flops=numbers["peak_tflops"] * 1e12 * numbers["attained"],
            memory=numbers["memory_gb_s"] * 1e9,
            node=_link(numbers, "links.node."),
            network=_link(numbers, NETWORK) if f"{NETWORK}gb_s" in numbers else None,
            ranks_per_node=self.ranks_per_node,
            peer=numbers["peer_us"] * 1e-6,
            launch=numbers["launch_us"] * 1e-6,
            attention=numbers["attention"],
            moe=numbers["moe"],
            copy=numbers["copy"],
            tax=numbers["tax"],
            halves=numbers["halves"],
            fixed=numbers["fixed_ms"] * 1e-3,
            other=numbers["other_ms"] * 1e-3,
            fused=self.kernels == "fused",
        )

    def with_values(self, given: Mapping[str, float]) -> "Profile":
        """Return the profile with values that the user gives."""
        values = {key: Value(number, "given") for key, number in given.items()}
        return replace(self, values={**self.values, **values})


def _link(numbers: Mapping[str, float], prefix: str) -> Link:
    rate = numbers[f"{prefix}gb_s"] * 1e9 * numbers[f"{prefix}attained"]
    return Link(rate, numbers[f"{prefix}latency_us"] * 1e-6)


# ---------------------------------------------------------------------- reading


def names() -> list[str]:
    """Return the clusters that scmoe knows by name."""
    return sorted(path.stem for path in (SHIPPED / "cluster").glob("*.yaml"))


def read_profile(name: str, overrides: Sequence[str] = ()) -> Profile:
    """Return the profile of a name or a file. overrides: cluster.KEY=NUMBER.

    ConfigError: there is none, a value is missing or not allowed.
    """
    path = find(f"cluster/{name}")
    if not path.is_file():
        path = find(name)
    if not path.is_file():
        allowed = ", ".join([*names(), "measure", "a YAML file"])
        raise ConfigError(f"cluster is {show(name)}, allowed: {allowed}")
    profile = parse_profile(read_text(path), str(path), path.stem)
    return overridden(profile, overrides)


def parse_profile(text: str, source: str, name: str) -> Profile:
    """Return the profile of a text. source: its name in messages."""
    tree = mapping_of(parse_yaml(text, source), source)
    ranks = whole(tree.pop("ranks", None), f"{source}: ranks")
    per_node = whole(tree.pop("ranks_per_node", None), f"{source}: ranks_per_node")
    if ranks % per_node:
        raise ConfigError(f"{source}: ranks is {ranks}, allowed: multiples of ranks_per_node")
    precision = tree.pop("precision", None)
    if precision not in PRECISIONS:
        raise ConfigError(
            f"{source}: precision is {show(precision)}, allowed: {' | '.join(PRECISIONS)}"
        )
    kernels = tree.pop("kernels", "eager")
    check_kernels(kernels, source)
    optional = {
        key: _value(tree.pop(key), allowed, f"{source}: {key}").value
        for key, allowed in OPTIONAL.items()
        if key in tree
    }
    values = _values(tree, source, several_nodes=ranks > per_node)
    return Profile(
        name,
        precision,
        ranks,
        per_node,
        values,
        kernels,
        padding=optional.get("padding"),
        memory_gb=optional.get("memory_gb"),
    )


def _values(tree: Mapping[str, Any], source: str, several_nodes: bool) -> dict[str, Value]:
    entries = dict(_entries(tree))
    has_network = several_nodes or any(key.startswith(NETWORK) for key in entries)
    for key in entries:
        if key not in KEYS:
            known = ", ".join([*KEYS, *OPTIONAL])
            raise ConfigError(f"{source}: unknown key {key}, allowed: {known}")
    values = {}
    for key, allowed in KEYS.items():
        if key in entries:
            values[key] = _value(entries[key], allowed, f"{source}: {key}")
        elif allowed.default is not None:
            values[key] = Value(allowed.default, "guess")
        elif has_network or not key.startswith(NETWORK):
            raise ConfigError(f"{source}: {key} is missing: {allowed.meaning}. Add it to the file.")
    return values


def _entries(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted keys and what the file has for them."""
    entries = []
    for key, value in tree.items():
        if isinstance(value, dict) and "value" not in value and "source" not in value:
            entries += _entries(value, f"{prefix}{key}.")
        else:
            entries.append((f"{prefix}{key}", value))
    return entries


def _value(entry: Any, allowed: Allowed, where: str) -> Value:
    if not isinstance(entry, dict) or set(entry) != {"value", "source"}:
        raise ConfigError(f"{where} is {show(entry)}, allowed: {{value: NUMBER, source: SOURCE}}")
    if entry["source"] not in SOURCES:
        raise ConfigError(
            f"{where}.source is {show(entry['source'])}, allowed: {' | '.join(SOURCES)}"
        )
    return Value(number(entry["value"], allowed, f"{where}.value"), entry["source"])


def number(text: Any, allowed: Allowed, where: str) -> float:
    """Return the number of a text. ConfigError: it is none, or not an allowed one."""
    try:
        parsed = float(text)
    except (TypeError, ValueError):
        parsed = math.nan
    if not allowed.low <= parsed <= allowed.high:
        raise ConfigError(f"{where} is {show(text)}, allowed: {allowed.low:g} to {allowed.high:g}")
    return parsed


def whole(text: Any, where: str) -> int:
    """Return the number of a text, 1 or more."""
    if not (isinstance(text, str) and text.isdecimal() and int(text) >= 1):
        raise ConfigError(f"{where} is {show(text)}, allowed: a whole number, 1 or more")
    return int(text)


def overridden(profile: Profile, words: Sequence[str]) -> Profile:
    """Return the profile with the words cluster.KEY=NUMBER in it."""
    numbers = {}
    kernels = profile.kernels
    optional = {"padding": profile.padding, "memory_gb": profile.memory_gb}
    for word in words:
        name, _, text = word.removeprefix("--").partition("=")
        key = name.removeprefix("cluster.")
        if key == "kernels":
            check_kernels(text, "command line: cluster")
            kernels = text
            continue
        if key in optional:
            optional[key] = number(text, OPTIONAL[key], f"command line: {name}")
            continue
        if key not in KEYS or (key not in profile.values and key.startswith(NETWORK)):
            known = ", ".join([*profile.values, *OPTIONAL, "kernels"])
            raise ConfigError(f"command line: unknown key {name}, allowed: cluster. and {known}")
        numbers[key] = number(text, KEYS[key], f"command line: {name}")
    return replace(
        profile, kernels=kernels, padding=optional["padding"], memory_gb=optional["memory_gb"]
    ).with_values(numbers)


def check_kernels(kernels: Any, source: str) -> None:
    if kernels not in KERNELS:
        raise ConfigError(f"{source}.kernels is {show(kernels)}, allowed: {' | '.join(KERNELS)}")
