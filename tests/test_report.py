"""Reports are printed as tables and bullets."""

from scmoe.report import Report, bullets_and_tables


def test_a_cell_is_empty_where_a_row_lacks_its_value():
    rows = {"a": {"ms": 1.26, "of": [1, 2]}, "b": {"ms": None}}
    report = Report("conditions", rows, {"ms": "{ms:.1f}", "second": "{of[1]}"})
    assert report.cells() == [["a", "1.3", "2"], ["b", "", ""]]
    table = ["| row | ms | second |", "| --- | --- | --- |", "| a | 1.3 | 2 |", "| b |  |  |"]
    assert report.markdown().splitlines() == ["conditions", "", *table]


def test_brackets_are_shown(capsys):
    Report("medians, [quartiles]", {"a": {"ms": 1}}, {"[low high]": "[{ms}]"}).show()
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("medians, [quartiles]", "[low high]", "[1]"))


def test_nested_values_are_bullets_and_tables():
    lines = bullets_and_tables(
        {"a": 0.123456, "rows": {"x|y": {"ms": 1.0}, "z": {"error": "broken\nhere"}}}
    )
    head = ["- a: 0.1235", "", "rows:", "", "|  | ms | error |", "| --- | --- | --- |"]
    assert lines == [*head, "| x/y | 1 |  |", "| z |  | broken here |"]
    assert bullets_and_tables({"error": "a\nb"}) == ["```text", "a\nb", "```"]
