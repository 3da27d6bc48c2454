"""`bench overlap`, `timeline` and `growth` as a user runs them, but small: what they print and draw."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from scmoe.testbed import links

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


@pytest.mark.skipif(links.why_not() is not None, reason=f"links cannot be shaped here: {links.why_not()}")
def test_timeline(tmp_path):
    run("experiments.bench", "timeline", "--share", "0.3", "--out", str(tmp_path))
    assert {path.name for path in tmp_path.glob("*.png")} == {"forward.png", "backward.png"}
    trace = json.loads((tmp_path / "pos2-overlapped-1-chunks.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    operators = ("route", "encode", "dispatch", "experts", "combine", "decode", "attention", "mlp", "shared_expert")
    assert {f"scmoe/{operator}" for operator in operators} <= names


@pytest.mark.skipif(links.why_not() is not None, reason=f"links cannot be shaped here: {links.why_not()}")
def test_bench_growth(tmp_path):
    small = ("--points", "256", "512", "--rounds", "2", "--out", str(tmp_path))
    out = run("experiments.bench", "growth", "--of", "tokens", *small)
    points = json.loads(out.splitlines()[-1])["tokens"]
    assert [point["tokens"] for point in points] == [256, 512]
    assert points[0]["link_mbit"] == points[1]["link_mbit"]
    assert all(point["compute"] == "emulated" and point.keys() >= TOP for point in points)
    assert (tmp_path / "growth.png").exists()
