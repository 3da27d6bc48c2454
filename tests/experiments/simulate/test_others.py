"""What was predicted of other people's clusters is what the page and the advice say of it."""

import json
import math

import pytest

from experiments.simulate.others import OtherCell, error_of, judged, read_cells, request_of
from scmoe.predict.advise import CELL_ERROR
from tests.support.pages import ROOT

KEPT = json.loads((ROOT / "docs/results/others.json").read_text(encoding="utf-8"))
RUNS, CELLS = read_cells(ROOT / "docs/results/others.yaml")


def test_the_interval_of_an_advice_holds_nine_of_ten_measured_speed_ups():
    assert KEPT["cell_error"] <= CELL_ERROR < KEPT["cell_error"] + 0.01


def test_the_page_has_the_kept_predictions():
    page = (ROOT / "docs/would-it-pay.md").read_text(encoding="utf-8")
    for name, cell in KEPT["cells"].items():
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert f"| {cell['measured']:.2f} | {cell['predicted']:.2f} |" in line


def test_a_ratio_is_that_of_the_times_that_were_printed():
    for cell in CELLS:
        slow, fast = (RUNS[cell[name]].get("seconds") for name in ("slow", "fast"))
        if slow and fast:
            assert float(slow) / float(fast) == pytest.approx(float(cell["ratio"]), abs=0.006)


def test_a_micro_batch_is_that_of_the_ranks_that_share_a_weight():
    request = request_of(RUNS["aws-30b-ep16"])
    assert (request.samples, request.tensor_parallel, request.stage_layers) == (4, 8, 12)
    # 256 sequences, two groups of 4 each
    assert request.config.values.trainer.accumulate == 32


def test_null_and_interval_come_from_the_other_cells():
    ratios = {1.1: 1.2, 1.4: 1.2, 1.3: 1.3}
    cells = [
        OtherCell(str(measured), "overlap", False, measured, predicted, True)
        for measured, predicted in ratios.items()
    ]
    first = judged(cells)[0]
    assert first.null == pytest.approx(math.sqrt(1.4 * 1.3))
    width = error_of(cells[1:])
    assert width == pytest.approx(math.log(1.4 / 1.2))
    assert first.interval[1] == pytest.approx(1.2 * math.exp(width)) and first.holds
