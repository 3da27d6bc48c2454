from experiments.conform.answers_table import cell, results, table_lines
from experiments.conform.libraries import LIBRARIES, python_of
from tests.support.pages import ROOT


def test_the_page_has_the_answers_that_are_kept():
    page = (ROOT / "docs/conform.md").read_text(encoding="utf-8")
    assert "\n".join(table_lines()) in page
    assert results().keys() == LIBRARIES.keys()


def test_a_cell_is_the_worst_answer_on_any_number_of_ranks():
    passed, unasked = {"answer": "passed"}, {"answer": "not asked"}
    assert cell({"1": unasked, "2": passed}) == "yes"
    assert cell({"1": unasked}) == "–"
    assert cell({"2": passed, "4": {"answer": "crashed"}}) == "**crash**"
    failed = {"answer": "failed", "ratio": 2.0}
    assert cell({"2": {"answer": "crashed"}, "4": failed}) == "**no**, 2"


def test_packages_are_pinned_and_none_is_made_for_ours(tmp_path):
    packages = [package for library in LIBRARIES.values() for package in library.packages]
    assert packages and all("==" in package for package in packages)
    assert python_of(LIBRARIES["own"], tmp_path) and not list(tmp_path.iterdir())
