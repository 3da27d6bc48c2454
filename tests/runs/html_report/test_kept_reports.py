"""Results of the docs become sections, with the pictures of their conditions; what is no result is
refused."""

import pytest

from scmoe.runs.html_report import kept_reports
from scmoe.runs.html_report.cleaner import Cleaner
from scmoe.runs.html_report.kept_reports import refuse_form, sections_of_file
from tests.support import reported

pytest.importorskip("matplotlib")


def test_the_pictures_of_a_result_of_the_docs_are_those_of_its_conditions(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    (docs / "results/table3-small").mkdir(parents=True)
    (docs / "figures").mkdir()
    said = {"date": "2026-11-30", "reading": "A *reading*.", "pictures": {"table3-small": "Losses"}}
    reported.write_json(docs / "results/conditions.json", {"table3-small": said})
    path = reported.write_json(docs / "results/table3-small/results.json", reported.table())
    monkeypatch.setattr(kept_reports, "CHECKOUT", tmp_path)
    (docs / "figures/table3-small.png").write_bytes(reported.DOT)
    (section,) = sections_of_file(path, True, Cleaner([]))
    assert [picture.caption for picture in section.pictures] == ["Losses"]
    assert section.facts[0] == ("date", "2026-11-30")
    assert (section.paragraphs, section.commands) == (["A reading."], ["make table"])


def test_a_report_of_several_loads_is_one_section_for_each(tmp_path):
    loads = [reported.speeds() | {"load": {"name": name}} for name in ("hot_rank:1.7", "recorded")]
    path = reported.write_json(tmp_path / "uneven.json", {"loads": loads})
    names = ["uneven: load hot_rank:1.7", "uneven: load recorded"]
    assert [section.title for section in sections_of_file(path, True, Cleaner([]))] == names


@pytest.mark.parametrize("form", ["{x.__class__}", "{x:>9999}", "{x:{y}}", "{a[b].c}"])
def test_a_format_that_does_more_than_to_round_is_refused(form):
    with pytest.raises(ValueError, match="more than to round"):
        refuse_form(form)


def test_formats_of_stored_results_are_accepted():
    for form in ("{ms:.1f}", "{rows[real, 0.5 ms][ddp]:,}", "{a[0]:.2f}, {b} MiB"):
        refuse_form(form)
