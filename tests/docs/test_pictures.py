"""The pictures and pages of results are those that `make figures` would make now; all readers can
read them."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from docs.build.pages import (
    DRAW,
    HEADLINE,
    PAGES,
    README,
    RECORDS,
    RESULTS,
    SCREENSHOTS,
    draw_of,
    experiments,
    pages,
    pictures,
)
from experiments.bench.speed_chart import PAPERS
from experiments.engine import gantt
from experiments.tables.table_file import load_table
from scmoe import charts
from scmoe.config.leaves import ConfigError
from scmoe.predict.row_names import name_of
from tests import terminal
from tests.support.pictures import assert_readable, assert_values_off_the_bars

ROOT = Path(__file__).parents[2]
BARS = ("overlap", "inference", "figure-13")
OF_RESULTS = (
    *DRAW,
    *("figure-", "table", "family", "quality", "two-batches", "one-sequence", "trend"),
)


@pytest.fixture
def drawn(monkeypatch):
    """Return a list of all figures that are saved, with their metadata. No file is written."""
    found = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, metadata: found.append((figure, metadata))
    )
    return found


def test_the_pictures_of_the_docs_show_what_their_reports_say_and_are_readable(drawn):
    made, stale = pictures(), []
    assert {path.stem for path in PAGES.glob("*.png")} == made.keys() | {*RECORDS, *SCREENSHOTS}
    for name, draw in made.items():
        draw(PAGES / f"{name}.png")
        figure, metadata = drawn.pop()
        with Image.open(PAGES / f"{name}.png") as image:
            if image.info.get("Description") != metadata["Description"]:
                stale.append(name)
        assert_readable(figure)
        if name.startswith(BARS):
            assert_values_off_the_bars(figure)
    assert not stale, "make figures draws them again"


def test_points_of_another_number_of_blocks_are_on_no_line(drawn):
    """A line that joins reports of four blocks and of eight would show the number of blocks as an
    effect of the share."""
    pictures()["two-batches"](Path("x.png"))
    (figure, _) = drawn[0]
    eight = json.loads((PAGES / f"{HEADLINE}.json").read_text())
    assert eight["layers"] == 8
    for axes in figure.axes[:2]:
        places = [list(line.get_xdata()) for line in axes.lines]
        assert [eight["comm_share"]] in places, "it is shown"
        assert not [line for line in places if len(line) > 1 and eight["comm_share"] in line]


@pytest.mark.parametrize("name", ["ways", "timelines", "slots", "chunks"])
def test_of_an_operator_all_bars_have_its_name_or_none(drawn, name):
    pictures()[name](Path("x.png"))
    (axes,) = drawn[0][0].axes
    colors = {to_hex(bar.get_facecolor()): [] for bar in axes.patches}
    for bar in axes.patches:
        center = bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2
        is_named = any(np.allclose(text.get_position(), center) for text in axes.texts)
        if bar.get_width() > 0:  # those of the legend have no width
            colors[to_hex(bar.get_facecolor())].append(is_named)
    transfers = colors[gantt.OPERATOR_COLORS["dispatch"]] + colors[gantt.OPERATOR_COLORS["combine"]]
    assert transfers and len(set(transfers)) == 1


def test_every_page_of_results_says_what_its_json_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    made = pages()
    by_hand = {RESULTS / "method.md", RESULTS / "archive.md"}
    assert made.keys() == {README, *RESULTS.rglob("*.md")} - by_hand
    assert not [path for path, text in made.items() if path.read_text() != text], (
        "make figures writes them again"
    )


def test_every_picture_of_a_result_is_on_its_page(monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = {name for each in experiments() for name in each.said.get("pictures", ())}
    of_results = {name for name in pictures() if name.startswith(OF_RESULTS)}
    assert of_results == shown
    assert [each.name for each in experiments() if len(each.said["reading"].split()) > 80] == []


def test_a_page_has_the_numbers_of_its_json(tmp_path, monkeypatch):
    """A report that is measured again changes its page and the overview, and a number that is not
    there is an error."""
    for folder in (PAGES, RESULTS):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("states", "*.png")
        )
    shutil.copy(ROOT / README, tmp_path)
    monkeypatch.chdir(tmp_path)
    name = "overlap-real-block-2-ranks-share-0.52"
    path, before = PAGES / f"{name}.json", pages()
    report = json.loads(path.read_text())
    report["rows"]["scmoe_pos3"]["train_speedup"] = 7.654
    path.write_text(json.dumps(report))
    after = pages()
    assert {page for page in after if after[page] != before[page]} == {
        RESULTS / f"{name}.md",
        RESULTS / "README.md",
    }
    assert all("| 7.65" in after[page] for page in (RESULTS / f"{name}.md", RESULTS / "README.md"))
    del report["rows"]["scmoe_pos3"]
    path.write_text(json.dumps(report))
    with pytest.raises(KeyError, match="scmoe_pos3"):
        pages()


def test_a_picture_is_stale_if_a_value_a_name_or_a_colour_has_changed(drawn, monkeypatch):
    report = json.loads((PAGES / "inference-2-ranks-share-0.52.json").read_text())
    draw = DRAW["inference-"]

    def digest() -> str:
        draw(report, Path("x.png"))
        return drawn[-1][1]["Description"]

    first = digest()
    assert digest() == first
    report["rows"]["scmoe_pos2"]["prefill"]["limit"] += 0.001
    limit = digest()
    monkeypatch.setitem(name_of.__globals__["ARCHITECTURE_NAMES"], "top1", "Top-1")
    name = digest()
    monkeypatch.setitem(draw.__globals__, "RED", charts.GREEN)
    assert len({first, limit, name, digest()}) == 4


def test_a_report_that_nothing_draws_is_refused():
    with pytest.raises(ConfigError, match="other is no report"):
        draw_of("other")


def test_a_recording_shows_what_a_terminal_shows_at_the_end(tmp_path):
    printed = (
        "first\r\n\x1b[1;31mred\x1b[0m and plain\r\nstep 1/2\r\x1b[Kstep"
        " 2/2\r\n12\r\n\x1b[A\x1b[2K\rtop"
    )
    lines = terminal.lines_of(printed)
    assert [line.plain for line in lines] == ["first", "red and plain", "step 2/2", "top", ""]
    assert [(span.start, span.end) for span in lines[1].spans] != [], "colours stay"
    terminal.draw(lines, tmp_path / "out.svg")
    svg = (tmp_path / "out.svg").read_text()
    assert "red" in svg and "and&#160;plain" in svg
    shown = [line.strip() for line in terminal.shown_in(svg)]
    assert shown == ["scmoe", "first", "red and plain", "step 2/2", "top"]
    assert re.findall(r"https?://[^\"]*", svg) == ["http://www.w3.org/2000/svg"], "it loads nothing"


def test_a_command_that_fails_is_not_recorded():
    with pytest.raises(SystemExit, match="failed with 3"):
        terminal.record([sys.executable, "-c", "print('so far'); raise SystemExit(3)"])


def test_the_paper_s_values_are_those_of_its_tables():
    for share, table in ((0.52, "table1"), (0.15, "table2")):
        printed = {}
        for row in load_table(table).rows:
            speeds = {
                kind: row.paper[f"{word} speed-up"]
                for kind, word in (("train", "training"), ("forward", "inference"))
            }
            # Table 2 has two models; GPT2-MoE-Medium stands first
            printed.setdefault(row.speed, speeds)
        for row, speeds in PAPERS[share].rows.items():
            assert printed[row] == speeds, (share, row)
