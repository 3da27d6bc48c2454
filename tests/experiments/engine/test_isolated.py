"""A part that fails, hangs, crashes or lacks a package is reported, and the rest goes on."""

import json

import pytest

from experiments.bench.gpu.check import write_report
from experiments.engine.isolated import CheckPart, Place, run_parts
from scmoe.parallel.checkpoint.durable import process_start

pytestmark = [pytest.mark.smoke, pytest.mark.ranks]


def test_a_part_that_fails_hangs_crashes_or_lacks_a_package_is_reported_and_the_rest_goes_on(
    tmp_path,
):
    pid_file, module = tmp_path / "pid", "tests.support.check_parts:pieces"
    parts = {
        "fails": CheckPart("Fails", module, 30, (), ("fail",)),
        "hangs": CheckPart("Hangs", module, 5, (), ("hang", str(pid_file))),
        "crashes": CheckPart("Crashes", module, 30, (), ("crash",)),
        "lacks": CheckPart(
            "Lacks a package", module, 30, ("json", "no_such_package"), ("measure",)
        ),
        "is_no_module": CheckPart(
            "Cannot be imported", "tests.support.no_such_module:pieces", 30, ()
        ),
        "is fine": CheckPart("Measures", module, 30, (), ("measure",)),
    }
    out = tmp_path / "out"
    out.mkdir()
    found = run_parts(parts, Place("cpu", True, out))
    states = {name: part["state"] for name, part in found.items()}
    assert states == {
        **{"fails": "failed", "hangs": "stopped", "crashes": "failed", "lacks": "missing"},
        **{"is_no_module": "failed", "is fine": "ok"},
    }
    assert found["fails"]["why"].endswith("ValueError: as wanted ")
    assert (
        found["hangs"]["why"].startswith("stopped by its clock after 1 pieces")
        and found["hangs"]["seconds"] < 30
    )
    assert (
        "about to crash" in found["crashes"]["why"] and "ended with -6" in found["crashes"]["why"]
    )
    assert found["lacks"]["why"] == "not installed: no_such_package"
    assert "No module named 'tests.support.no_such_module'" in found["is_no_module"]["why"]
    for name in ("fails", "hangs", "crashes", "is fine"):
        assert found[name]["pieces"]["first"] == {"value": 1}, (
            "what was measured before the end stays"
        )
    assert process_start(int(pid_file.read_text())) is None, "what a part has started ends with it"
    assert write_report(Place("cpu", True, out), found) == []
    report = (out / "report.md").read_text()
    assert all(part["why"] in report for part in found.values() if "why" in part)
    assert json.loads((out / "results.json").read_text())["parts"] == found


def test_parts_whose_names_differ_behind_a_dot_keep_their_results_apart(tmp_path):
    module = "tests.support.check_parts:pieces"
    parts = {
        "share-0.52": CheckPart("Measures", module, 30, (), ("measure",)),
        "share-0.15": CheckPart(
            "Cannot be imported", "tests.support.no_such_module:pieces", 30, ()
        ),
    }
    found = run_parts(parts, Place("cpu", True, tmp_path))
    assert found["share-0.52"]["state"] == "ok"
    assert found["share-0.15"]["state"] == "failed"
    assert found["share-0.15"]["pieces"] == {}
