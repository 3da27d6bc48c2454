"""Reports of `bench overlap` as the simulator reads them: what top-2 measured about its operators,
and the speed-ups of all rows.

A report calibrates the simulator by its sequential top-2 alone: the times of the operators from the
gate on, one at a time, and the time of the whole row of blocks with free links. What these leave is
attention's. 22 of the kept reports, in 18 files, have no `calibration`, such as
docs/figures/overlap-real-block-2-ranks-share-0.15.json. For these, `assumed` says what is assumed
instead.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.bench.overlap.limits import PAYLOAD, row_bytes
from experiments.bench.row import Row, from_json, rows_of
from experiments.bench.setting import Setting, share_sent
from experiments.engine.links import BURST_KIB
from scmoe.predict.row_names import batches_of
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.play import TRANSFERS

ROUTED = 2  # experts of a token in top-2
COMPUTED = ("route", "encode", "experts", "decode")
SAME_SPEED = 0.1  # reports that do not state their sizes are of one setting up to this difference
BYTES = 4  # of a number
SIZES = (  # that the calibration of a report may state
    "dim",
    "ffn_dim",
    "heads",
    "tokens",
    "seq_len",
    "accumulate",
    "num_experts",
    "attention_ms",
    "attention_to_mlp",
)
LAUNCH_S = 1e-3  # of every transfer; measured: 1.0 to 1.7 ms (docs/results/archive.md)
ASSUMED_OF_HALVES = "halves of the rows take half of the time"


@dataclass(frozen=True)
class Calibration:
    """What top-2 measured, in seconds.

    operators: of one MoE module, from the gate on; transfers without their launches, on links that
    have saved nothing. free_forward, free_backward: all blocks of one batch with free links.
    update: the optimizer's step. link_mbit: the rate of the links. tax: processor time of a
    transfer over its time, where it competes with computation. in_halves: forward and backward of
    all blocks with free links and two batches in flight; None: not measured. assumed: what the
    report does not state.
    """

    setting: Setting
    operators: OperatorTimes
    free_forward: float
    free_backward: float
    update: float
    link_mbit: float
    tax: float
    in_halves: tuple[float, float] | None = None
    assumed: tuple[str, ...] = ()

    @property
    def sublayers(self) -> OperatorTimes:
        """The times of an attention and of an MLP, which is half of the experts' time."""
        forward = self._sublayers(self.operators.forward, self.free_forward)
        backward = self._sublayers(self.operators.backward, self.free_backward)
        return OperatorTimes(forward, backward)

    def _sublayers(self, operators: Mapping[str, float], free: float) -> dict[str, float]:
        modules = self.setting.moe_blocks
        mlps = self.setting.layers - modules
        mlp = operators["experts"] / ROUTED
        module = sum(operators[name] for name in COMPUTED)
        attention = (free - mlps * mlp - modules * module) / self.setting.layers
        return {"attention": attention, "mlp": mlp}

    @property
    def longer_in_halves(self) -> tuple[float, float]:
        """By what factors computing all rows takes longer in two halves, in forward and in a step:
        products of half the rows. A factor below 1 counts as 1: it is taken as noise."""
        if self.in_halves is None:
            return 1.0, 1.0
        forward, backward = self.in_halves
        step = self.free_forward + self.free_backward
        return max(1.0, forward / self.free_forward), max(1.0, (forward + backward) / step)

    @property
    def is_consistent(self) -> bool:
        """Whether something is left for attention. Where it is not, the machine was slower while
        the operators were measured one at a time."""
        both = self.sublayers
        return min(both.forward["attention"], both.backward["attention"]) > 0

    @property
    def burst(self) -> float:
        """Seconds that a link needs for its burst."""
        return burst_s(self.link_mbit)

    def with_rate(self, link_mbit: float) -> "Calibration":
        """Return the calibration for links with another rate: transfers take as much longer, and
        the same processor time."""
        factor = self.link_mbit / link_mbit

        def scaled(times: Mapping[str, float]) -> dict[str, float]:
            return {name: factor * t if name in TRANSFERS else t for name, t in times.items()}

        operators = OperatorTimes(scaled(self.operators.forward), scaled(self.operators.backward))
        return replace(self, operators=operators, link_mbit=link_mbit, tax=self.tax / factor)

    def sum_s(self, numbers: int) -> float:
        """Return how long the gradients of this many weights take on the link, in a ring."""
        return seconds_on_link(2 * share_sent(self.setting.ranks) * BYTES * numbers, self.link_mbit)


def seconds_on_link(nbytes: float, link_mbit: float) -> float:
    """Return how long a link carries bytes of rows or gradients, with their headers."""
    return nbytes / (link_mbit * 1e6 / 8 * PAYLOAD)


def burst_s(link_mbit: float) -> float:
    """Return the seconds that a link needs for its burst."""
    return BURST_KIB * 2**10 / (link_mbit * 1e6 / 8)


@dataclass(frozen=True)
class Measured:
    """A report. calibration: of the balanced load; None: it states none, as its operators were
    measured at another load, or it was refused, as it contradicts itself. load: of the experts;
    None: balanced. experts_ms: top-2's experts in forward, at even rows. stated: the sizes are the
    report's own, not the usual ones of its level."""

    name: str
    setting: Setting
    comm_share: float
    link_mbit: float
    rows: Mapping[str, Row]
    calibration: Calibration | None
    load: str | None
    experts_ms: float
    stated: bool
    refused: bool = False

    def same_setting(self, other: "Measured") -> bool:
        """Return whether both differ in their share, load and rows only. Where one does not state
        its sizes, the experts' times must be nearly equal too."""
        if comparable(self.setting) != comparable(other.setting):
            return False
        if self.stated and other.stated:
            return True
        return abs(self.experts_ms / other.experts_ms - 1) < SAME_SPEED


def comparable(setting: Setting) -> Setting:
    """Return the setting without what two reports of one setting may differ in."""
    return replace(
        setting,
        share=0.0,
        link_mbit=None,
        rounds=0,
        rows=(),
        loads=(),
        layout=None,
        rows_per_gradient=None,
    )


def read_reports(folder: Path) -> list[Measured]:
    """Return the reports of `bench overlap` with shaped links in a folder and below it, by name.
    Files of other benches are left out."""
    reports: list[Measured] = []
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            reports += measured_in(content, path.relative_to(folder).with_suffix("").as_posix())
    return reports


def measured_in(content: Mapping[str, Any], name: str) -> Iterator[Measured]:
    """Yield the reports of a file: one, or one for each load. Blocks with an MoE in each, and
    layouts that drop rows or send empty ones, are left out: the simulator has nothing that is
    compared there."""
    for report in content.get("loads", [content]):
        shaped = report.get("device") == "cpu" and report.get("link_mbit") is not None
        if "top2_operators_ms" not in report or not shaped:
            continue
        if report.get("every", 2) != 2 or report.get("top_k", 1) != 1:
            continue
        load = report["load"]["name"] if "load" in report else None
        exact = ("dropless", "capacity:1") if load is None else ("dropless",)
        if report.get("layout", "dropless") not in exact:
            continue
        yield measured_of(report, name, load)


def measured_of(report: Mapping[str, Any], name: str, load: str | None) -> Measured:
    """Return a report, at its load."""
    setting = setting_of(report)
    rows = rows_of(report)
    calibration = None
    if "calibration" in report:
        calibration = stated_calibration(setting, report)
    elif load is None:
        calibration = derived_calibration(setting, report, rows["top2"])
    busiest = 1.0 if load is None else report["load"]["max_over_mean_ranks"]
    refused = calibration is not None and not calibration.is_consistent
    return Measured(
        name=name,
        setting=setting,
        comm_share=report["comm_share"],
        link_mbit=report["link_mbit"],
        rows=rows,
        calibration=None if refused else calibration,
        refused=refused,
        load=load,
        experts_ms=report["top2_operators_ms"]["forward"]["experts"] / busiest,
        stated="calibration" in report,
    )


def setting_of(report: Mapping[str, Any]) -> Setting:
    """Return what was measured. A report without `calibration` states few sizes; the others are
    the usual ones of its level."""
    if "setting" in report:
        return from_json(Setting, report["setting"])
    usual = Setting(level=report["level"])
    calibration = report.get("calibration", {}).get("sizes", {})
    sizes = {name: calibration[name] for name in SIZES if name in calibration}
    stated = {name: report[name] for name in ("tokens", "dim", "accumulate") if name in report}
    return replace(
        usual,
        ranks=report["ranks"],
        compute=report["compute"],
        layers=report.get("layers", usual.layers),
        **{"ffn_dim": 4 * stated.get("dim", usual.dim), **stated, **sizes},
    )


def operators_of(
    setting: Setting, link_mbit: float, times_ms: Mapping[str, Mapping[str, float]]
) -> OperatorTimes:
    """Return the operators' times, of transfers those on links that have saved nothing. A transfer
    was measured after an idle time, with its launch.

    Gradients of rows are as many bytes as rows, so their transfers take forward's time: in an
    iteration the measured ones share the link with other gradients."""
    nbytes = row_bytes(setting, "top2") / (len(TRANSFERS) * setting.moe_blocks)
    saved = min(burst_s(link_mbit), seconds_on_link(nbytes, link_mbit))
    forward = {name: ms / 1e3 for name, ms in times_ms["forward"].items()}
    backward = {name: ms / 1e3 - forward[name] for name, ms in times_ms["train"].items()}
    for transfer in TRANSFERS:
        forward[transfer] = max(0.0, forward[transfer] + saved - LAUNCH_S)
        backward[transfer] = forward[transfer]
    return OperatorTimes(forward, backward)


def tax_of(setting: Setting, report: Mapping[str, Any], operators: OperatorTimes) -> float:
    """Return the processor time of top-2's transfers, without their launches, over their time.
    Emulated operators sleep, so nothing slows them."""
    if setting.compute == "emulated":
        return 0.0
    launches = len(TRANSFERS) * setting.moe_blocks * LAUNCH_S
    processor_s = report["transfer_cpu_ms_forward"] / 1e3 - launches
    transfers = setting.moe_blocks * sum(operators.forward[name] for name in TRANSFERS)
    return max(0.0, processor_s / transfers)


def stated_calibration(setting: Setting, report: Mapping[str, Any]) -> Calibration:
    """Return the calibration that a report states."""
    stated = report["calibration"]
    operators = operators_of(setting, report["link_mbit"], stated["operators_ms"])
    halves = stated.get("free_in_halves_ms")
    has_halves = any(batches_of(row) == 2 for row in report["rows"])
    return Calibration(
        setting,
        operators,
        free_forward=stated["free_forward_ms"] / 1e3,
        free_backward=stated["free_backward_ms"] / 1e3,
        update=stated["update_ms"] / 1e3,
        link_mbit=report["link_mbit"],
        tax=tax_of(setting, report, operators),
        in_halves=halves and (halves["forward"] / 1e3, halves["backward"] / 1e3),
        assumed=(ASSUMED_OF_HALVES,) if has_halves and not halves else (),
    )


def derived_calibration(setting: Setting, report: Mapping[str, Any], top2: Row) -> Calibration:
    """Return the calibration of a report without `calibration`, from its limits: these are
    sequential top-2's time over that with free links."""
    operators = operators_of(setting, report["link_mbit"], report["top2_operators_ms"])
    free_forward = top2.forward_ms * top2.forward_speedup / report["limit_forward"] / 1e3
    if setting.level == "block":
        free_train = top2.train_ms * top2.train_speedup / report["limit_train"] / 1e3
        free_backward = free_train - free_forward
        assumed: tuple[str, ...] = ()
    else:  # this level's limit has gradients in it
        module_f, module_b = (
            sum(times[name] for name in COMPUTED)
            for times in (operators.forward, operators.backward)
        )
        slower = operators.backward["experts"] / operators.forward["experts"]
        rest = free_forward - setting.moe_blocks * module_f
        free_backward = slower * rest + setting.moe_blocks * module_b
        assumed = ("attention's backward is the experts' ratio to forward", "the update is free")
    return Calibration(
        setting,
        operators,
        free_forward,
        free_backward,
        update=0.0,
        link_mbit=report["link_mbit"],
        tax=tax_of(setting, report, operators),
        assumed=assumed,
    )
