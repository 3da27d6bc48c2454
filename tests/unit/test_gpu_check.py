"""The GPU check keeps to nine minutes and to its files' limits, reads profiles of a card, and has the configs' values.

No card is needed: the profile is written by hand in the form in which torch exports one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.experiments.bench.gpu import gpu_report as report
from scmoe.experiments.bench.gpu import pictures
from scmoe.experiments.bench.gpu.events import device_work, host_waits, operator_ms, within
from scmoe.experiments.bench.gpu.gpu_models import GPT2_MOE_SMALL, QUICKSTART
from scmoe.experiments.bench.gpu.gpu_parts import LIMIT_S, PARTS
from scmoe.experiments.bench.gpu.timing import compare
from scmoe.schedule.play import Span

ROOT = Path(__file__).parents[2]


def test_all_clocks_together_leave_half_a_minute_of_nine():
    assert sum(part.clock_s for part in PARTS.values()) <= LIMIT_S == 9 * 60 - 30


# ---------------------------------------------------------------------- configurations


def test_gpt2_moe_small_is_that_of_the_files(tmp_path):
    file = tmp_path / "gpt2.yaml"
    extended = [str(ROOT / "configs" / name) for name in ("base.yaml", "model/gpt2_moe_small.yaml")]
    file.write_text(f"extends: {extended}\ndata: {{name: synthetic}}\ntrainer: {{precision: bf16-mixed}}\n")
    assert load(file, []) == GPT2_MOE_SMALL


def test_the_quickstart_differs_from_that_of_the_file_in_place_precision_and_text():
    file = load(ROOT / "configs/quickstart.yaml", [])
    ours: Config = replace(QUICKSTART, name=file.name, trainer=file.trainer, strategy=file.strategy)
    assert replace(ours, data=replace(ours.data, name="sotu", path=None)) == file
    assert (QUICKSTART.trainer.precision, QUICKSTART.trainer.max_steps) == ("bf16-mixed", file.trainer.max_steps)


# ---------------------------------------------------------------------- profiles


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


PROFILE = [
    {"ph": "M", "name": "process_name", "pid": 0},
    event("user_annotation", "step", 0.0, 100.0),
    event("user_annotation", "scmoe/route", 1.0, 20.0),
    event("cpu_op", "aten::mm", 2.0, 5.0),
    event("cuda_runtime", "cudaLaunchKernel", 3.0, 1.0, correlation=1),
    event("cpu_op", "aten::item", 10.0, 8.0),
    event("cpu_op", "aten::_local_scalar_dense", 11.0, 6.0),
    event("cuda_runtime", "cudaMemcpyAsync", 12.0, 1.0, correlation=2),
    event("cuda_runtime", "cudaStreamSynchronize", 13.0, 3.0, correlation=3),
    event("cuda_runtime", "cudaLaunchKernel", 50.0, 1.0, tid=2, correlation=4),  # backward runs on another thread
    event("kernel", "gemm", 40.0, 1000.0, tid=7, correlation=1, grid=[4, 2, 1]),
    event("gpu_memcpy", "Memcpy DtoH", 41.0, 500.0, tid=7, correlation=2),
    event("kernel", "gemm_backward", 2000.0, 3000.0, tid=7, correlation=4, grid=[1, 1, 1]),
    event("gpu_user_annotation", "scmoe/route", 40.0, 1500.0, tid=7),
    event("cuda_runtime", "cudaDeviceSynchronize", 200.0, 3.0, correlation=5),  # after the step
    event("kernel", "of another step", 300.0, 9000.0, tid=7, correlation=6, grid=[1, 1, 1]),
]


def test_work_of_the_device_belongs_to_the_operator_that_launched_it():
    events = within(PROFILE, "step")
    assert operator_ms(events) == {"route": 1.5}
    work = device_work(events)
    assert (work["kernels"], work["kernel_ms"], work["copies"], work["copy_ms"]) == (2, 4.0, 1, 0.5)
    assert list(work["longest_kernels_ms"]) == ["gemm_backward", "gemm"]


def test_waits_of_the_host_are_counted_where_they_are_asked_for():
    waits = host_waits(within(PROFILE, "step"))
    assert waits == {"cudaStreamSynchronize in aten::_local_scalar_dense of scmoe/route": 1}


def test_without_a_device_an_operator_takes_its_time_on_the_host():
    on_host = [e for e in PROFILE if e.get("cat") in ("user_annotation", "cpu_op")]
    assert operator_ms(within(on_host, "step")) == {"route": 0.02}


# ---------------------------------------------------------------------- times, pictures, files


def test_a_variant_that_cannot_run_has_its_error_and_the_others_their_times():
    def x():
        return torch.randn(4, 8, requires_grad=True)

    variants = {
        "small": lambda: (nn.Linear(8, 8), x()),
        "other": lambda: (nn.Linear(8, 8), x()),
        "broken": lambda: (nn.Linear(9, 8), x()),
    }
    found = compare(torch.device("cpu"), variants, {"other": "small", "broken": "small"}, rounds=2)
    assert list(found) == list(variants)
    assert found["other"]["over"] == "small" and found["other"]["train_ratio"] > 0 < found["small"]["forward_ms"]
    assert "shapes cannot be multiplied" in found["broken"]["error"]


def test_beside_is_the_share_of_transfers_in_which_an_operator_computes():
    spans = [Span("dispatch", 0, 4), Span("attention", 1, 3), Span("experts", 4, 6), Span("combine", 6, 10)]
    assert pictures.beside(spans) == 2 / 8


def test_without_matplotlib_the_missing_picture_is_said(monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    said = pictures.drawn(lambda *_: pytest.fail("drawn"), {}, Path("a.png"))
    assert said == "not drawn: matplotlib is missing"


def test_the_largest_files_go_until_the_limits_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TOTAL_MB", 5.001)
    for i, size in enumerate((10, 20, 30, 400, 500, 600, 700, 2000)):
        (tmp_path / f"{i}.png").write_bytes(bytes(size))
    removed = report.trim(tmp_path)
    assert [line.split(",")[0] for line in removed] == ["7.png", "6.png", "5.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "3.png", "4.png"]


def test_a_report_shows_numbers_tables_and_errors():
    lines = report.markdown({"a": 0.123456, "rows": {"x|y": {"ms": 1.0}, "z": {"error": "broken\nhere"}}})
    head = ["- a: 0.1235", "", "rows:", "", "| | ms | error |", "| --- | --- | --- |"]
    assert lines == [*head, "| x/y | 1 |  |", "| z |  | broken here |"]
    assert report.markdown({"error": "a\nb"}) == ["```text", "a\nb", "```"]
