"""A table's file: its metrics, its rows with the paper's values, and the scales at which it can be
run.

metrics   the first decides: rows are compared, drawn and ordered by it
rows      overrides of the scale's config; each is compared with its baseline
scales    config, seeds, and what is done after the trainings: `evaluate` and `bench`, the words of
          two commands
"""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from os.path import normpath
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from scmoe.config.leaves import ConfigError
from scmoe.config.load import SHIPPED, find, parse_yaml
from scmoe.sweeps.checks import LIST, MAPPING, TEXT, Rule, check, one_of, refusal

TABLES_FOLDER = SHIPPED / "experiment"
MOST_SHARES = 3  # at which losses are compared at equal time: more do not fit into the chart
SPEED_KEYS = ("train_speedup", "forward_speedup")  # what a metric from speed may name


@dataclass(frozen=True)
class Metric:
    """source: summary (of a run), curve (of a run: its last four losses), evaluation (of a run),
    speed (the testbed), paper (not measured here)."""

    name: str
    unit: str
    better: str  # lower | higher
    source: str
    keys: tuple[str, ...]  # dotted, in the source; the metric is their mean
    times: float  # the source's value is multiplied by this


@dataclass(frozen=True)
class TableRow:
    name: str
    groups: tuple[str, ...]  # parts of the table that show it
    paper: Mapping[str, float]  # by metric
    overrides: tuple[str, ...]  # key=value, on the config of the scale
    baseline: str  # the row that it is compared with; its own name: it is one
    speed: str | None = None  # the testbed's row of the same architecture
    setting: str | None = None  # one of the scale's `settings`

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def is_baseline(self) -> bool:
        return self.baseline == self.name


@dataclass(frozen=True)
class Scale:
    config: Path
    seeds: int  # their number
    jobs: int  # runs in parallel; 0: all in one process
    # of the whole table at this scale, as measured or calculated in its file's header
    minutes: float = 0.0
    # the words of the evaluate command after the run; None: no evaluation
    evaluate: tuple[str, ...] | None = None
    bench: tuple[str, ...] | None = None  # the words of `bench overlap`; None: no speeds
    # those of the table's shares that are measured at this scale; None: all
    shares: tuple[float, ...] | None = None
    # the scale that is run where the config's data set is not on this machine
    otherwise: str | None = None
    first_seed: int = 1  # a search has other seeds than the table whose rates it finds
    # key=value by name, for the rows that name it: the size of a model, or a learning rate, differs
    # between scales
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """An experiment that was registered before its runs: rows are equal if they differ by less than
    `margin`, and are compared at `looks`, in seeds a row (equivalence.py)."""

    margin: float
    looks: tuple[int, ...]


@dataclass(frozen=True)
class PaperTable:
    name: str
    title: str
    metrics: tuple[Metric, ...]
    rows: tuple[TableRow, ...]
    scales: Mapping[str, Scale]
    share: float | None = None  # share of communication at which the testbed measures speeds
    equal_time: tuple[float, ...] = ()  # shares at which losses are compared at equal time
    decision: Decision | None = None  # all pairs of rows are compared by it, and not by baselines

    @property
    def decides(self) -> Metric:
        return self.metrics[0]

    @property
    def comparisons(self) -> int:
        return sum(not row.is_baseline for row in self.rows)

    @property
    def shares(self) -> list[float]:
        """Return all shares of communication at which speeds are measured."""
        return sorted({*self.equal_time, *([] if self.share is None else [self.share])})

    @property
    def summary_keys(self) -> list[str]:
        """Return the keys of summary.json without which a training has failed."""
        keys = [key for metric in self.metrics_from("summary") for key in metric.keys]
        return [*dict.fromkeys(["val_loss", *keys])]

    def metrics_from(self, source: str) -> list[Metric]:
        return [metric for metric in self.metrics if metric.source == source]

    def row(self, name: str) -> TableRow:
        return next(row for row in self.rows if row.name == name)


@Parameter(name="*")
@dataclass(frozen=True)
class TableOptions:
    """The options of `table`.

    Args:
        scale: one of table.yaml: smoke | small | digits
        jobs: number of runs in parallel; 0: all in this process
        seeds: number of seeds of each row
        to: copy results and states of finished runs into this folder
    """

    scale: str = "smoke"
    jobs: int | None = None
    seeds: int | None = None
    to: Path | None = None


def table_names(root: Path = TABLES_FOLDER) -> list[str]:
    """Return the names of all tables."""
    return sorted(path.parent.name for path in root.glob("*/table.yaml"))


def load_table(name: str, root: Path | None = None) -> PaperTable:
    """Read the table of <root>/<name>/table.yaml. Raises ConfigError, in one line, for what cannot
    be read.

    root: None: configs/experiment of the current folder, or the shipped one where it has no such
    table.
    """
    path = root / name / "table.yaml" if root else find(f"configs/experiment/{name}/table.yaml")
    if not path.is_file():
        raise ConfigError(
            f"table is {name!r}, allowed: {', '.join(table_names(root or TABLES_FOLDER))}"
        )
    try:
        return _table(name, path.parent, parse_yaml(path.read_text(encoding="utf-8"), "the file"))
    # ConfigError, or a text that is not UTF-8, or a quotation without its end
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def check_scale(table: PaperTable, scale: str) -> None:
    """Raise ConfigError for a scale that the table does not have."""
    if scale not in table.scales:
        raise ConfigError(
            f"--scale is {scale!r}, allowed for {table.name}: {', '.join(table.scales)}"
        )


def _table(name: str, folder: Path, tree: Any) -> PaperTable:
    check("", tree, TABLE, ("title", "metrics", "baseline", "scales", "rows"))
    metrics = tuple(_metric(key, entry) for key, entry in tree["metrics"].items())
    rows = tuple(_row(entry, tree["baseline"], tree["metrics"]) for entry in tree["rows"])
    scales = {
        scale: _scale(scale, folder, entry, tree["scales"])
        for scale, entry in tree["scales"].items()
    }
    if len({row.slug for row in rows}) < len(rows):
        raise ConfigError("two rows have the same name. Names must differ in letters or digits")
    names = [row.name for row in rows]
    baselines = {
        "baseline": tree["baseline"],
        **{f"baseline of {row.name!r}": row.baseline for row in rows},
    }
    for key, baseline in baselines.items():
        if baseline not in names:
            raise refusal(key, baseline, ", ".join(map(repr, names)))
    for (name_of_scale, scale), row in product(scales.items(), rows):
        if row.setting is not None and row.setting not in scale.settings:
            allowed = f"{', '.join(scale.settings) or 'none'} at scale {name_of_scale}"
            raise refusal(f"setting of {row.name!r}", row.setting, allowed)
    if metrics[0].source == "speed":
        raise ConfigError(
            f"metrics.{metrics[0].name} is first and a speed, but rows are compared by the first"
            " metric, over seeds. Put a metric of the runs first"
        )
    if "share" not in tree and any(metric.source == "speed" for metric in metrics):
        raise ConfigError(
            "share is missing. Give the share of communication, between 0 and 1, at which the"
            " metrics of speed hold"
        )
    return PaperTable(
        name,
        tree["title"],
        metrics,
        rows,
        scales,
        share=_floats([tree["share"]])[0] if "share" in tree else None,
        equal_time=_floats(tree.get("equal_time", ())),
        decision=_decision(tree["decision"]) if "decision" in tree else None,
    )


def _decision(entry: Any) -> Decision:
    check("decision", entry, DECISION, ("margin", "looks"))
    return Decision(float(entry["margin"]), tuple(map(int, entry["looks"])))


def _metric(name: str, entry: Any) -> Metric:
    check(f"metrics.{name}", entry, METRIC, ("unit", "better", "from"))
    keys = entry.get("key", name)
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    if entry["from"] == "speed" and (len(keys) > 1 or keys[0] not in SPEED_KEYS):
        raise refusal(f"metrics.{name}.key", keys, " | ".join(SPEED_KEYS))
    return Metric(
        name, entry["unit"], entry["better"], entry["from"], keys, float(entry.get("times", 1))
    )


def _row(entry: Any, baseline: str, metrics: Iterable[str]) -> TableRow:
    check("a row", entry, ROW, ("name", "groups", "paper", "overrides"))
    check(f"paper of {entry['name']!r}", entry["paper"], dict.fromkeys(metrics, A_NUMBER))
    paper = {metric: float(value) for metric, value in entry["paper"].items()}
    words, own_baseline = _overrides(entry["overrides"]), entry.get("baseline", baseline)
    return TableRow(
        entry["name"],
        tuple(entry["groups"]),
        paper,
        words,
        own_baseline,
        entry.get("speed"),
        entry.get("setting"),
    )


def _scale(name: str, folder: Path, entry: Any, scales: Mapping[str, Any]) -> Scale:
    check(f"scales.{name}", entry, SCALE, ("config", "seeds", "jobs"))
    otherwise = entry.get("otherwise")
    if otherwise is not None and otherwise not in scales:
        raise refusal(f"scales.{name}.otherwise", otherwise, ", ".join(scales))
    return Scale(
        config=Path(normpath(folder / entry["config"])),
        seeds=int(entry["seeds"]),
        jobs=int(entry["jobs"]),
        minutes=float(entry.get("minutes", Scale.minutes)),
        first_seed=int(entry.get("first_seed", Scale.first_seed)),
        evaluate=tuple(shlex.split(entry["evaluate"])) if "evaluate" in entry else None,
        bench=tuple(shlex.split(entry["bench"])) if "bench" in entry else None,
        shares=_floats(entry["shares"]) if "shares" in entry else None,
        otherwise=otherwise,
        settings={name: _overrides(keys) for name, keys in entry.get("settings", {}).items()},
    )


def _overrides(entry: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in entry.items())


def _floats(texts: Sequence[str]) -> tuple[float, ...]:
    """Return shares, rounded to four decimals so that the name of a file (`:g`) has all digits."""
    return tuple(round(float(text), 4) for text in texts)


def _between(least: float, most: float, allowed: str) -> Rule:
    """Return the rule of a finite number between two others, as a text, which is what parse_yaml
    gives."""

    def is_allowed(text: Any) -> bool:
        try:
            return math.isfinite(float(text)) and least < float(text) < most
        except (TypeError, ValueError):
            return False

    return is_allowed, allowed


A_NUMBER = _between(-math.inf, math.inf, "a number, such as 3.27")
A_POSITIVE = _between(0, math.inf, "a number above 0")
A_SHARE = _between(0, 1, "a number between 0 and 1")
LIST_OF_SHARES: Rule = (
    lambda v: isinstance(v, list) and all(map(A_SHARE[0], v)),
    "a list of numbers between 0 and 1",
)
TEXT_OR_LIST: Rule = (lambda v: isinstance(v, str) or LIST[0](v), "a text or a list")
VALUES: Rule = (lambda v: isinstance(v, dict), "a mapping of keys to values")
SETTINGS: Rule = (
    lambda v: isinstance(v, dict) and all(map(VALUES[0], v.values())),
    "names, each with a mapping",
)
TABLE: dict[str, Rule] = {
    **dict.fromkeys(("title", "baseline"), TEXT),
    **dict.fromkeys(("metrics", "scales"), MAPPING),
    "share": A_SHARE,
    "equal_time": (
        lambda v: LIST_OF_SHARES[0](v) and len(v) <= MOST_SHARES,
        f"{LIST_OF_SHARES[1]}, at most {MOST_SHARES}",
    ),
    "rows": LIST,
    "decision": MAPPING,
}
DECISION: dict[str, Rule] = {
    "margin": A_POSITIVE,
    "looks": (
        lambda v: (
            isinstance(v, list)
            and all(str(look).isdecimal() for look in v)
            and sorted({int(look) for look in v}) == [int(look) for look in v] != []
        ),
        "numbers of seeds in rising order, such as [16, 24, 40]",
    ),
}
METRIC: dict[str, Rule] = {
    "unit": TEXT,
    "better": one_of("lower", "higher"),
    "from": one_of("summary", "curve", "evaluation", "speed", "paper"),
    "key": TEXT_OR_LIST,
    "times": A_NUMBER,
}
ROW: dict[str, Rule] = {
    **dict.fromkeys(("name", "baseline", "speed", "setting"), TEXT),
    "groups": LIST,
    **dict.fromkeys(("paper", "overrides"), VALUES),
}
SCALE: dict[str, Rule] = {
    **dict.fromkeys(("config", "evaluate", "bench", "otherwise"), TEXT),
    **dict.fromkeys(
        ("seeds", "first_seed"), (lambda text: str(text).isdecimal() and int(text) > 0, "1 or more")
    ),
    "jobs": (lambda text: str(text).isdecimal(), "0 or more"),
    "minutes": A_POSITIVE,
    "settings": SETTINGS,
    "shares": LIST_OF_SHARES,
}
