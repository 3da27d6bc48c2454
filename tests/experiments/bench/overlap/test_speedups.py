"""Run `bench overlap` and `timeline` with small sizes, and check what they print and draw.

`bench overlap` runs as a user runs it, on shaped links where links can be shaped. `timeline`
measures in the same way, so here it measures a tiny pair on the loopback device, without a rate,
and tries each schedule once.
"""

import json
from collections.abc import Callable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.bench.overlap import rounds, speedups, timeline, uneven
from experiments.bench.overlap.refusals import refuse_impossible
from experiments.bench.pairs import default_schedule
from experiments.bench.rank_bench import VariantTimes
from experiments.bench.row import LoadFigures, Row, from_json, to_json
from experiments.bench.setting import Setting
from experiments.bench.stacks import Variant
from experiments.engine import links
from experiments.engine.ranks import run_ranks
from experiments.simulate.reports import read_reports
from scmoe.config.leaves import ConfigError
from scmoe.planning import planner
from tests.support.commands import called, run

pytestmark = [pytest.mark.ranks, pytest.mark.smoke]
MISSING = links.why_not()
ROWS = ("--rows", "top2", "scmoe_pos2_pipelined", "--rounds", "2")
TIMES_OF_BLOCKS = ("free_forward", "free_backward", "update")
TOP = {"comm_share", "link_mbit", "ranks", "device", "compute", "level", "rounds", "rows"}
ROW = {
    *(
        "forward_ms",
        "train_ms",
        "forward_speedup",
        "train_speedup",
        "overlap_forward",
        "overlap_backward",
    ),
    *("inside_attention", "auto_inside_attention"),
    *("slot", "chunks", "auto_slot", "auto_chunks", "peak_mb", "links", "compute"),
}


def check(report: dict[str, Any]) -> None:
    assert report.keys() >= TOP and report["rows"].keys() == {"top2", "scmoe_pos2_pipelined"}
    assert all(row.keys() >= ROW for row in report["rows"].values())
    pipelined = report["rows"]["scmoe_pos2_pipelined"]
    assert (
        pipelined["chunks"] in (2, 4)
        and pipelined["auto_chunks"] in (2, 4)
        and 0 <= pipelined["auto_slot"] <= 3
    )
    assert report["rows"]["top2"]["peak_mb"] > 0 and "inside_gain" not in report["rows"]["top2"]
    assert (
        "inside attention" in pipelined["inside_gain"]["inside"]
        and pipelined["inside_gain"]["train"][1] > 0
    )


@pytest.mark.faults  # the search alone: test_rate_search.py; the report: the iteration's below
def test_bench_overlap(tmp_path):
    """The block has emulated operators, and the command searches for the rate of the links."""
    sizes = (
        "--tokens",
        "128",
        "--seq-len",
        "32",
        "--dim",
        "64",
        "--attention-ms",
        "1",
        "--share",
        "0.3",
    )
    report = run(
        "-m", "experiments.bench", "overlap", *ROWS, *sizes, "--out", str(tmp_path)
    ).summary
    check(report)
    for row in report["rows"].values():
        assert (
            row["links"] == ("loopback" if MISSING else "shaped") and row["compute"] == "emulated"
        )
    assert "gradient_mb" not in report and "of_limit" not in report["rows"]["top2"]
    assert len(list(tmp_path.glob("*.png"))) == 1


def without_rate(
    rank: int, world_size: int, measure: Callable[..., Any], setting: Setting, *args: Any
) -> Any:
    links.set_rate = lambda mbit: None
    rounds.TRIALS, planner.STEPS_EACH = 1, 1
    rate = setting.link_mbit or 100.0  # the command does not search for a rate that is given
    return measure(
        rank,
        world_size,
        replace(setting, link_mbit=rate, tokens=64, seq_len=32, dim=32, tries=6),
        *args,
    )


@pytest.fixture
def tiny_on_loopback(monkeypatch):
    def measured(
        measure: Callable[..., Any], ranks: int, setting: Setting, *args: Any, **_: Any
    ) -> list[Any]:
        return run_ranks(without_rate, ranks, measure, replace(setting, attention_ms=1.0), *args)

    monkeypatch.setattr(links, "inside", lambda: True)
    monkeypatch.setattr(links, "enter", lambda *_: None)
    for module in (speedups, timeline):
        monkeypatch.setattr(module, "run_ranks", measured)


def test_bench_overlap_of_an_iteration(tiny_on_loopback, tmp_path):
    """The iteration has real operators, and their gradients are summed over the ranks."""
    words = (
        "--compute",
        "real",
        "--level",
        "iteration",
        "--ffn-dim",
        "128",
        "--out",
        str(tmp_path),
    )
    report = called("bench", "overlap", *ROWS, *words).summary
    check(report)
    # each of two top-2 pairs has a norm, a gate, attention and MLP in float32
    pair = 4 * 2 * 32 + 8 * 32 + 2 * (4 * 32 * 32 + 4 * 32) + 2 * 32 * 128 + 32 + 128
    assert all(row["of_limit"] > 0 and row["limit_train"] > 0 for row in report["rows"].values())
    assert report["limit_train"] == report["rows"]["top2"]["limit_train"]
    assert report["gradient_mb"] == report["rows"]["top2"]["gradient_mb"] == 2 * pair * 4 / 2**20
    (for_simulator,) = read_reports(tmp_path)
    assert for_simulator.stated and for_simulator.rows.keys() == report["rows"].keys()
    calibration = report["calibration"]
    assert from_json(Setting, report["setting"]) == for_simulator.setting
    assert for_simulator.setting.ffn_dim == 128
    assert min(calibration[f"{what}_ms"] for what in TIMES_OF_BLOCKS) > 0


@pytest.mark.faults
@pytest.mark.parametrize(
    ("row", "compute"), [("scmoe_pos2", "real"), ("farskip_pipelined", "emulated")]
)
def test_bench_overlap_of_an_iteration_with_an_moe_in_every_block(
    row, compute, tiny_on_loopback, tmp_path
):
    """Of four blocks the first has a shorter window at Nous' tap."""
    words = (
        "--every",
        "1",
        "--level",
        "iteration",
        "--ffn-dim",
        "128",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
    )
    report = called("bench", "overlap", "--rows", row, "--compute", compute, *words).summary
    own = report["rows"][row]
    assert len(own["auto_slots"]) == 4 and own["of_limit"] > 0
    assert row != "scmoe_pos2" or own["auto_slots"][0] in ("slot 0", "slot 1")
    # each block has a norm of the MoE, a gate, attention, and a shared expert where it is not
    # top-2; where they are real, also biases and a norm of attention. Nous' tap has a norm
    block = 2 * 32 + 8 * 32 + 4 * 32 * 32 + (2 * 32 + 4 * 32 if compute == "real" else 0)
    shared = 2 * 32 * 128 + (32 + 128 if compute == "real" else 0)
    tap_norm = 2 * 32 if row == "scmoe_pos2" else 0
    assert report["gradient_mb"] == 4 * block * 4 / 2**20
    assert own["gradient_mb"] == 4 * (block + shared + tap_norm) * 4 / 2**20
    (picture,) = tmp_path.glob("*.png")
    assert picture.stem == f"overlap-{compute}-iteration-2-ranks-share-0.52-every-1-ffn-128"


@pytest.mark.faults
@pytest.mark.parametrize("every", ["2", "1"])
def test_bench_overlap_at_two_loads(every, tiny_on_loopback, tmp_path):
    """The loads are measured beside the balanced one, and a rank that gets all rows says so."""
    loads = ("--load", "hot_rank:2", "--load", "rotating:1.5:1", "--every", every)
    words = (*ROWS, *loads, "--compute", "real", "--out", str(tmp_path))
    reports = called("bench", "overlap", *words).summary["loads"]
    assert [report["load"]["name"] for report in reports] == ["hot_rank:2", "rotating:1.5:1"]
    for report in reports:
        check(report)
        for row in report["rows"].values():
            assert min(row["over_balanced_train"], row["over_balanced_forward"]) > 0
            assert row["dropped"] == 0 and row["straggler_train"] > -1
    assert all(row["max_over_mean_ranks"] == 2.0 for row in reports[0]["rows"].values())
    assert len(list(tmp_path.glob("uneven-*.png"))) == 1


@pytest.mark.faults
@pytest.mark.parametrize(
    ("layout", "dropped"), [("capacity:1", 0.25), ("buffers:1", 0.25), ("buffers:2", 0.0)]
)
def test_a_layout_drops_what_a_load_has_above_it(layout, dropped, tiny_on_loopback, tmp_path):
    """Of 1.5 times its share a rank takes one: it drops a third of three quarters of all copies."""
    words = ("--rows", "scmoe_pos3", "--rounds", "2", "--load", "hot_rank:1.5", "--layout", layout)
    found = called("bench", "overlap", *words, "--out", str(tmp_path)).summary
    (row,) = found["loads"][0]["rows"].values()
    assert row["dropped"] == dropped


@pytest.mark.faults
def test_timeline(tiny_on_loopback, tmp_path):
    assert called("bench", "timeline", "--share", "0.3", "--out", str(tmp_path)).code == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"forward.png", "backward.png"}
    trace = json.loads((tmp_path / "pos2-overlapped-1-chunks.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    operators = (
        "route",
        "encode",
        "dispatch",
        "experts",
        "combine",
        "decode",
        "attention",
        "mlp",
        "shared_expert",
    )
    assert {f"scmoe/{operator}" for operator in operators} <= names


def test_bench_overlap_with_two_batches_in_flight(tiny_on_loopback, tmp_path):
    """The planner measures them too, and each row says what it gains over top-2's best."""
    words = (
        *("--rows", "top2", "top2_two", "scmoe_pos2_two_pipelined"),
        *("--compute", "real", "--rounds", "2"),
        *("--level", "iteration", "--layers", "2", "--ffn-dim", "128", "--out", str(tmp_path)),
    )
    report = called("bench", "overlap", *words).summary
    # backward is a difference of two times, which may be below 0 for blocks as small as these
    in_halves = report["calibration"]["free_in_halves_ms"]
    assert in_halves.keys() == {"forward", "backward"} and in_halves["forward"] > 0
    one, two = report["rows"]["top2"], report["rows"]["scmoe_pos2_two_pipelined"]
    assert (one["batches_in_flight"], two["batches_in_flight"]) == (1, 2)
    assert (two["chunks"], two["auto_chunks"], report["layers"]) == (2, 2, 2)
    for kind in ("forward", "train"):
        rivals = one["over_best_without_another_model"], two["over_best_without_shortcut"]
        assert {over[kind]["best"] for over in rivals} <= {"top2", "top2_two", "top2, sequential"}
        assert all(over[kind]["median"] > 0 for over in rivals)
    assert two["peak_mb"] > 0 and 0 < two["peak_over_one_batch"] < 2
    assert "peak_over_one_batch" not in one
    assert one["auto_of_both"]["batches_in_flight"] in (1, 2)
    assert one["auto_of_both"]["over_best"] > 0 and "auto_of_both" not in two
    (picture,) = tmp_path.glob("*.png")
    assert picture.stem.endswith("-layers-2-ffn-128")


def test_more_routed_experts_than_there_are_are_refused_before_a_measurement():
    for setting in (Setting(top_k=100), Setting(num_experts=2, rows=("top2", "top3"))):
        with pytest.raises(ConfigError, match=r"moe\.top_k is"):
            refuse_impossible(setting)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_processor_time_of_transfers_is_stated_on_cpus_alone(device, monkeypatch):
    """While the host waits for a GPU it spins, so its time is not that of the transfers."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    times = {
        Variant("top2", default_schedule("top2"), transfers): VariantTimes(*np.full((5, 2), took))
        for transfers, took in (("sequential", 2.0), ("free", 1.0))
    }
    setting = Setting(0.5, device=device, rows=())
    report = speedups.summary(rounds.Measurement(setting, 1.0, {}, times, {}, 1))
    assert report["comm_share"] == 0.5
    assert ("transfer_cpu_ms_forward" in report) is (device == "cpu")


def test_a_ragged_load_is_drawn_at_the_tokens_of_its_busiest_rank():
    """Its experts have equal rows, so by these it would stand at 1."""
    found = uneven.imbalance_of_block(Setting(), "ragged:1.5", "top2")
    required = {each.name: 1.0 for each in fields(Row) if each.default is NO_DEFAULT}
    row = Row(**required, at_load=LoadFigures(1.2, 1.3, [1.2, 1.4], 0.1, 0.1, **found))
    ((point,),) = uneven.lines_of([{"rows": {"top2": to_json(row)}, "load": found}]).values()
    assert (point[0], point.over_balanced) == (1.5, 1.3)
