"""Keys and names of machines stay out of a report."""

import pytest

from scmoe import __version__
from scmoe.runs.html_report.cleaner import Cleaner
from scmoe.runs.html_report.page import write_page
from tests.support import reported

pytest.importorskip("matplotlib")


def test_keys_and_names_of_machines_stay_out(tmp_path):
    run = reported.write_run(tmp_path / "runs")
    out = tmp_path / "report.html"
    write_page([str(run)], out, 12, __version__)
    text = out.read_text(encoding="utf-8")
    assert reported.KEY not in text and reported.HOST not in text and "cluster.org" not in text
    assert "scmoe train quickstart" in text
    clean = Cleaner(["train"])
    assert clean("train_123.4.pt.trace") == "*****_123.4.pt.trace", "a trace has its machine's name"
    assert clean({"a": ["train.lan:1 retrain 10.0.0.7", "https://me:pw@h/x"]}) == {
        "a": ["*****:1 retrain *****", "https://*****h/x"]
    }
