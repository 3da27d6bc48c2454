"""`scmoe simulate paper`: the closed form is the timeline, the fit finds parameters, intervals
cover, and every cell of the paper is printed once."""

import json
import math
import random
from collections import Counter
from itertools import product

import pytest

from experiments.bench.speed_chart import PAPERS
from experiments.figures.measured import SCENARIOS
from experiments.simulate import paper
from experiments.simulate.fit import fit, jackknife_plus
from experiments.simulate.paper_cells import predict_in_closed_form, read_cells
from experiments.simulate.ratios import (
    MODELS,
    ROWS,
    Parameters,
    at_share,
    module_share,
    step_in_closed_form,
    step_played,
)
from scmoe.command_line import call

CELLS = read_cells()
SLOW_LINK = Parameters(beta=1.7, attn=3.4, g=7.0, u=0.9, padded=1.25)
FAST_LINK = Parameters(beta=0.5, lat=1.0, g=19.0, padded=2.0, shared_hides=True)


@pytest.mark.parametrize("parameters", [SLOW_LINK, FAST_LINK])
def test_the_closed_form_is_the_timeline_with_one_chunk(parameters):
    for sizes, name, kind, pair in product(
        MODELS.values(), ROWS, ("train", "infer"), (False, True)
    ):
        closed = step_in_closed_form(sizes, ROWS[name], kind, parameters, pair)
        played = step_played(sizes, name, kind, parameters, pair)
        assert played.step == pytest.approx(closed.step)
        assert played.hidden == pytest.approx(closed.hidden)


def test_chunks_never_slow_a_row_as_they_cost_nothing():
    for name in ("top2", "shared_expert", "scmoe_pos2"):
        one, best = (
            step_played(MODELS["swinv2_moe_s"], row, "infer", SLOW_LINK, pair=True).step
            for row in (name, f"{name}_pipelined")
        )
        assert best <= one + 1e-9


def test_the_link_is_set_to_a_share_of_the_module():
    sizes = MODELS["swinv2_moe_s"]
    for share in (0.15, 0.5, 0.6):
        assert module_share(sizes, at_share(sizes, share, SLOW_LINK)) == pytest.approx(share)
    with pytest.raises(ValueError, match="share"):
        at_share(sizes, 0.001, FAST_LINK)


def test_the_fit_recovers_the_parameters_that_made_the_cells():
    structure = paper.STRUCTURES[paper.A30]
    of_machine = [cell for cell in CELLS if cell.source in ("table1", "figure1")]
    cells = [cell for cell in of_machine if cell.machine == paper.A30]
    known = {"beta": 1.5, "attn": 2.5, "g": 5.0, "u": 0.6}

    def predict(values):
        parameters = structure.parameters(shared_hides=False, values=values)
        return [predict_in_closed_form(cell, parameters) for cell in cells]

    found = fit(predict, predict(known), [1.0] * len(cells), structure.fitted, pull=1e-6)
    assert found == pytest.approx(known, rel=0.02)


def test_jackknife_plus_covers_what_its_bound_promises():
    """The estimator is the mean of the other logarithms, so the law is known without a fit."""
    generator = random.Random(0)
    size = 7
    covered = 0
    for _ in range(500):
        logs = [generator.gauss(0.0, 0.1) for _ in range(size + 1)]
        *seen, unseen = logs
        means = [(sum(seen) - log) / (size - 1) for log in seen]
        residuals = [abs(log - mean) for log, mean in zip(seen, means, strict=True)]
        low, high = jackknife_plus([math.exp(mean) for mean in means], residuals)
        covered += low <= math.exp(unseen) <= high
    assert covered / 500 >= 1 - 2 / (size + 1)


def test_the_cells_are_those_of_the_charts():
    """The charts of the benches have some of these numbers too."""
    others = ("llama2_moe", "gpt3_moe_xl")  # the charts have no such models
    cells = [cell for cell in CELLS if cell.model not in others]
    values = {(c.source, c.machine, c.row, c.over, c.quantity, c.kind): c.value for c in cells}
    machines = {0.52: ("table1", "8xA30-PCIe"), 0.15: ("table2", "8xA800-NVLink")}
    for share, printed in PAPERS.items():
        source, machine = machines[share]
        for row, speeds in printed.rows.items():
            for kind, of_chart in (("train", "train"), ("infer", "forward")):
                if row != "top2":
                    value = values[source, machine, row, "top2", "speedup", kind]
                    assert value == speeds[of_chart]
    for scenario in SCENARIOS:
        machine = {0.6: "8xA30-PCIe", 0.15: "8xA800-NVLink", 0.5: "2x8xA800"}[scenario.module_share]
        for kind in ("train", "infer"):
            hidden = values["figure8", machine, "scmoe_pos2", "top2", "hidden", kind]
            assert hidden == scenario.hidden
            for over, speed in scenario.over.items():
                row = "scmoe_pos2_pipelined"
                assert values["figure8", machine, row, over, "speedup", kind] == speed
        share = values["figure1", machine, "top2", "top2", "module_share", "infer"]
        assert share == scenario.module_share


def test_the_split_is_that_of_the_decision():
    for cell in CELLS:
        is_scmoe = cell.row.startswith("scmoe") and (cell.source, cell.row) != (
            "table1",
            "scmoe_pos1",
        )
        assert cell.seen != (is_scmoe or cell.source == "figure8"), cell


def test_the_command_prints_every_cell_once_and_reaches_its_goal(capsys):
    assert call("simulate", "paper") == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    lines = report["cells"]
    printed = Counter((c["table"], c["machine"], c["model"], c["cell"]) for c in lines)
    assert printed == Counter((c.table, c.machine, c.model, c.name) for c in CELLS)
    assert set(printed.values()) == {1}
    assert sum(paper.tables_of(lines)[i].title in err for i in range(3)) == 3

    worst, nulls = report["max_error_unseen"], report["null_errors"]
    assert worst["Table 1"] <= 0.08
    assert 1.5 * worst["Table 1"] <= min(nulls["Table 1"])
    unseen = [c for c in lines if c["split"] == "unseen" and c["table"] in ("Table 1", "Table 2")]
    assert all(c["interval"][0] <= c["predicted"] <= c["interval"][1] for c in unseen)
    assert report["note"] == paper.commit_of_note()


def test_without_git_the_note_is_named_without_a_commit(monkeypatch):
    monkeypatch.setattr(paper.shutil, "which", lambda name: None)
    assert paper.commit_of_note() is None
