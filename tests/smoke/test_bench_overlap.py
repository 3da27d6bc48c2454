"""`bench overlap`, `timeline` and `growth` with small sizes: what they print and draw.

`bench overlap` runs as a user runs it, on shaped links where they can be shaped. The other two measure in the same way,
so here they measure a tiny pair on the loopback device, without a rate.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from experiments import bench
from scmoe.testbed import growth, links, timeline
from scmoe.testbed.pairs import Setting
from scmoe.testbed.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.smoke]
TOP = {"comm_share", "link_mbit", "ranks", "device", "compute", "level", "rounds", "rows"}
ROW = {
    *("forward_ms", "train_ms", "forward_speedup", "train_speedup", "overlap_forward", "overlap_backward"),
    *("slot", "chunks", "auto_slot", "auto_chunks", "peak_mb", "links", "compute"),
}


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("compute", ["emulated", "real"])
def test_bench_overlap(compute, tmp_path):
    small = ("--tokens", "128", "--seq-len", "32", "--dim", "64")
    small += ("--ffn-dim", "128") if compute == "real" else ("--attention-ms", "4")
    level = "iteration" if compute == "real" else "block"
    rows = ("--rows", "top2", "scmoe_pos2_pipelined", "--rounds", "2", "--level", level, "--out", str(tmp_path))
    out = run("experiments.bench", "overlap", "--compute", compute, "--share", "0.3", *small, *rows)
    report = json.loads(out.splitlines()[-1])
    assert report.keys() >= TOP and report["rows"].keys() == {"top2", "scmoe_pos2_pipelined"}
    for row in report["rows"].values():
        assert row.keys() >= ROW
        assert row["links"] == ("loopback" if links.why_not() else "shaped") and row["compute"] == compute
    pipelined = report["rows"]["scmoe_pos2_pipelined"]
    assert pipelined["chunks"] in (2, 4) and pipelined["auto_chunks"] in (2, 4) and 0 <= pipelined["auto_slot"] <= 3
    assert report["rows"]["top2"]["peak_mb"] > 0
    assert all(row["auto_over_best"] >= 0.5 for row in report["rows"].values())
    if level == "iteration":  # in float32: a norm, a gate, attention and MLP of two top-2 pairs
        pair = 4 * 2 * 64 + 8 * 64 + 2 * (4 * 64 * 64 + 4 * 64) + 2 * 64 * 128 + 64 + 128
        assert report["gradient_mb"] == report["rows"]["top2"]["gradient_mb"] == 2 * pair * 4 / 2**20
    else:
        assert "gradient_mb" not in report
    assert len(list(tmp_path.glob("*.png"))) == 1


def without_rate(rank: int, world_size: int, measure: Callable[..., Any], setting: Setting, *args: Any) -> Any:
    links.set_rate = lambda mbit: None
    rate = setting.link_mbit or 100.0  # a given rate is not searched for
    return measure(rank, world_size, replace(setting, link_mbit=rate, tokens=64, seq_len=32, dim=32), *args)


@pytest.fixture
def tiny_on_loopback(monkeypatch):
    def measured(measure: Callable[..., Any], ranks: int, setting: Setting, *args: Any, **_: Any) -> list[Any]:
        return run_ranks(without_rate, ranks, measure, replace(setting, attention_ms=1.0), *args)

    monkeypatch.setattr(links, "inside", lambda: True)
    monkeypatch.setattr(links, "enter", lambda again: None)
    for module in (growth, timeline):
        monkeypatch.setattr(module, "run_ranks", measured)


def test_timeline(tiny_on_loopback, tmp_path):
    assert bench.main(["timeline", "--share", "0.3", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"forward.png", "backward.png"}
    trace = json.loads((tmp_path / "pos2-overlapped-1-chunks.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    operators = ("route", "encode", "dispatch", "experts", "combine", "decode", "attention", "mlp", "shared_expert")
    assert {f"scmoe/{operator}" for operator in operators} <= names


def test_bench_growth(tiny_on_loopback, tmp_path, capsys):
    small = ("--points", "256", "512", "--rounds", "2", "--out", str(tmp_path))
    assert bench.main(["growth", "--of", "tokens", *small]) == 0
    points = json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]
    assert [point["tokens"] for point in points] == [256, 512]
    assert points[0]["link_mbit"] == points[1]["link_mbit"]
    assert all(point["compute"] == "emulated" and point.keys() >= TOP for point in points)
    assert (tmp_path / "growth.png").exists()
