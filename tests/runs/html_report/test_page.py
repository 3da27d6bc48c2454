"""`scmoe report`: each input has its part, texts stay texts, keys and machines stay out, and what
cannot be shown is refused in one line."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scmoe import __version__
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.runs.html_report import run_sections
from scmoe.runs.html_report.cleaner import Cleaner
from scmoe.runs.html_report.page import write_page
from scmoe.runs.seen import SeenRun
from tests.support import reported

pytest.importorskip("matplotlib")
STYLE = Path(__file__).parents[3] / "scmoe/runs/html_report/templates/style.css"
EVIL = "<script>alert(1)</script><b onclick='x'>$\\frac{a}{b}$&amp;\x07"


class Seen(HTMLParser):
    """What a browser would see: headings, texts, elements, captions, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.captions: list[str] = []
        self.texts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        self.inside = tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside in ("h1", "h2", "h3", "figcaption") and data.strip():
            (self.captions if self.inside == "figcaption" else self.headings).append(data.strip())


def page(tmp_path: Path, *names: object, last: int = 12) -> Seen:
    out = tmp_path / "out" / "report.html"
    write_page([str(name) for name in names], out, last, __version__)
    return Seen(out.read_text(encoding="utf-8"))


def test_every_input_has_its_section_and_the_pictures_that_lie_beside_it(tmp_path):
    run = reported.write_run(tmp_path / "runs")
    speeds = reported.write_json(tmp_path / "speeds.json", reported.speeds())
    (tmp_path / "table").mkdir()
    table = reported.write_json(tmp_path / "table/results.json", reported.table())
    drawn = ("speeds.png", "table/chart.png", "table/equal_time.png", "other.png")
    for name in drawn:
        shutil.copy(run / "analysis/expert_load.png", tmp_path / name)
    advice = tmp_path / "advice.json"
    advice.write_text(f"a line before\n{json.dumps(reported.advice())}\n", encoding="utf-8")
    measured = {"title": "A *layer*", "rows": {"ours": {"ms": 1.5, "deep": {"gib": 2}}}}
    others = reported.write_json(tmp_path / "others.json", measured)

    seen = page(tmp_path, run, table, speeds, advice, others)
    expected = ["Results", "Runs", "Losses of quickstart", "Environment and configuration"]
    assert [heading for heading in seen.headings if heading in expected] == expected
    assert seen.captions == [
        *("chart", "equal time", "speeds"),
        "Losses of quickstart over tokens",
        "Losses of quickstart over seconds of training",
        "expert load",
    ]
    assert seen.elements.count("figure") == seen.elements.count("img") == len(seen.captions)
    text = " ".join(seen.texts)
    for value in ("3.225", "-0.02", "1.43", "within the error", "0123456", "deep, gib"):
        assert value in text, value
    for value in ("qwen3_moe", "8x8xH100-InfiniBand", "16,384", "Standard top-8", "0.97, 1.13"):
        assert value in text, f"of the advice: {value}"


def test_a_picture_that_is_damaged_or_gone_is_left_out_with_a_line(tmp_path, capsys):
    run = reported.write_run(tmp_path / "runs")
    (run / "analysis/gating.png").write_bytes(b"half")
    (run / "analysis/similarity.png").mkdir()
    assert "gating" not in page(tmp_path, run).captions
    said = capsys.readouterr().err
    assert "gating.png is left out" in said and "similarity.png is left out" in said


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    out = tmp_path / "report.html"
    write_page([str(reported.write_run(tmp_path / "runs"))], out, 12, __version__)
    text = out.read_text(encoding="utf-8")
    seen = Seen(text)
    assert not {"script", "iframe"} & {*seen.elements}
    targets = [v for k, v in seen.attributes if k in ("src", "href", "xlink:href")]
    assert all(target and target.startswith(("#", "data:")) for target in targets)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    ids = [value for key, value in seen.attributes if key == "id"]
    assert len(ids) == len({*ids})
    assert {target[1:] for target in targets if target[0] == "#"} <= {*ids}


def test_nothing_in_names_configs_or_files_becomes_markup(tmp_path):
    run = reported.write_run(tmp_path / "runs", "<i>quick</i> & $x$")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config + f"# {EVIL[:-1]}\n", encoding="utf-8")
    reported.write_json(run / "env.json", {"command": ["scmoe", EVIL], "platform": EVIL})
    files = []
    for name in ("table", "speeds", "advice"):
        text = json.dumps(getattr(reported, name)())
        evil = json.dumps(EVIL)[1:-1]
        for word in ("scmoe_pos2", "ScMoE Pos-2", "Table 3", "within the error", "4 layers"):
            text = text.replace(word, evil)
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(text, encoding="utf-8")

    seen = page(tmp_path, run, *files)
    assert not {"script", "b", "i"} & {*seen.elements}
    assert not [key for key, _ in seen.attributes if key.startswith("on")]
    assert "<script>alert(1)</script>" in " ".join(seen.texts), "it is shown as it is"


def test_names_of_machines_stay_out_of_the_legends_of_losses(tmp_path, monkeypatch):
    reported.write_run(tmp_path / "runs", stamp="20261128-101500")
    run = reported.write_run(tmp_path / "runs")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    assert "\n  path: null" in config
    config = config.replace("\n  path: null", f"\n  path: /{reported.HOST}/data")
    (run / "config.yaml").write_text(config, encoding="utf-8")
    legends = []
    monkeypatch.setattr(
        run_sections, "draw", lambda runs, labels, path, **_: legends.append((labels, path.touch()))
    )
    page(tmp_path, tmp_path / "runs")
    expected = ["a: 20261128-101500 data.path=null", "b: 20261129-101500 data.path=/*****/data"]
    assert [labels for labels, _ in legends] == [expected, expected]


def test_what_cannot_be_shown_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    bad = {"no.json": "", "text.json": "no JSON", "list.json": "[1]", "other.json": '{"a": 1}'}
    bad["trace.json"] = '{"traceEvents": []}'
    bad["half.json"] = '{"rows": [{"name": "a"}, {"no name": 1}]}'
    bad["form.json"] = json.dumps(
        {"tables": [{"title": "t", "columns": {"x": "{x.__class__}"}, "rows": {"r": {"x": 1}}}]}
    )
    for name, text in bad.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for word in ("missing", "empty", *bad):
        assert call("report", word) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0]
        assert captured.out == ""
    assert call("report") == 2, "there is no folder runs"
    assert "Train a run first" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_link_to_a_run_is_that_run_in_the_chart_of_its_folder(tmp_path, monkeypatch):
    older = reported.write_run(tmp_path / "runs", stamp="20261128-101500")
    newer = reported.write_run(tmp_path / "runs")
    (tmp_path / "runs/latest").symlink_to(newer)
    monkeypatch.chdir(tmp_path)
    seen = page(tmp_path, "runs", "runs/latest", older)
    assert [heading for heading in seen.headings if heading.startswith("Losses")] == [
        "Losses of quickstart"
    ]
    monkeypatch.chdir(newer)
    assert f"quickstart/{newer.name}" in page(tmp_path, ".").headings


def test_what_is_broken_in_a_searched_folder_is_left_out(tmp_path, capsys):
    reported.write_run(tmp_path / "runs")
    half = {"tables": [{"title": "no rows", "columns": {"ms": "{ms}"}}]}
    path = reported.write_json(tmp_path / "runs" / "half.json", half)
    (tmp_path / "runs" / "text.json").write_text("no JSON", encoding="utf-8")
    assert "Runs" in page(tmp_path, tmp_path / "runs").headings
    assert f"{path} has a damaged table" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="damaged table"):
        page(tmp_path, path)


FILES_OF_A_RUN = (
    *("config.yaml", "config-from-3.yaml", "metrics.csv", "summary.json", "state.json"),
    *("env.json", "analysis/expert_load.png"),
)
DAMAGE = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00\n\x00",
    "a list": b"[1, 2]\n",
    "texts": b'{"tokens_per_s": "x", "mfu": "x", "command": 3, "packages": [1], "layers": 3}\n',
    "columns of texts": b"step,layer,dropped,expert_0,val/loss\nx,y,1,2,3\nnan,0,1,2,3\n",
    "null": b'{"data": {"seq_len": null, "name": null}, "trainer": {"max_steps": x}}\n',
}


def test_a_damaged_file_of_one_run_spoils_no_list_of_all_runs(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    whole = reported.write_run(runs)
    for day, content in enumerate(DAMAGE.values(), 10):
        for minute, file in enumerate(FILES_OF_A_RUN, 10):
            run = reported.write_run(runs, stamp=f"202612{day}-10{minute}00")
            (run / file).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert call("runs", "--last", "99") == 0
    listed = capsys.readouterr()
    assert call("report", "--last", "99") == 0
    reports = capsys.readouterr()
    assert whole.name in listed.out and whole.name in (tmp_path / "report.html").read_text()
    not_utf8 = "quickstart/20261211-10"
    assert f"{not_utf8}1000-lr-1e-3/config.yaml" in listed.err
    assert f"{not_utf8}1200-lr-1e-3/metrics.csv" in listed.err
    assert f"{not_utf8}1600-lr-1e-3/analysis/expert_load.png" in reports.err


def test_rows_have_names_in_words(tmp_path):
    speeds = reported.speeds()
    (row,) = speeds["rows"].values()
    speeds["rows"] |= {"top8_two_pipelined": row, "my_block": row}
    speeds["paper"]["top8_two_pipelined"] = {"train": 1.23}
    path = reported.write_json(tmp_path / "speeds.json", speeds)
    seen = page(tmp_path, path)
    text = " ".join(seen.texts)
    for name in ("ScMoE (Pos-2)", "Standard top-8, two batches in flight, pipelined", "my_block"):
        assert name in text
    assert "scmoe_pos2" not in text and "top8" not in text
    assert "1.43" in text and "1.23" in text, "the paper's values stay at their rows"
    reported.write_json(path, speeds | {"every": 1})
    assert "Nous (Pos-2)" in " ".join(page(tmp_path, path).texts)


def test_colours_have_enough_contrast_in_light_and_dark():
    """WCAG's 4.5 for texts."""
    light, dark = STYLE.read_text(encoding="utf-8").split("prefers-color-scheme: dark", 1)
    for mode in (light, dark.split("}", 1)[0]):
        colors = dict(re.findall(r"--(\w+): (#\w{6});", mode))
        for name in ("ink", "muted", "c1", "c2", "c3", "c5"):
            for ground in ("paper", "shade"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)


def test_a_table_that_is_wider_than_the_screen_has_a_shadow_where_it_goes_on():
    """A shadow at each edge, and a cover that moves with the table."""
    (rule,) = re.findall(r"^\.table \{(.*?)^\}", STYLE.read_text(encoding="utf-8"), re.M | re.S)
    assert rule.count(" scroll") == rule.count(" local") == 2


def contrast(a: str, b: str) -> float:
    dark, light = sorted(map(luminance, (a, b)))
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_runs_of_one_name_in_two_folders_have_a_row_each(tmp_path):
    runs = [SeenRun(reported.write_run(tmp_path / folder)) for folder in ("a", "b")]
    for run in runs:
        (run.path / "metrics.csv").unlink()  # no losses are drawn
    overview = run_sections.sections_of_runs(runs, Cleaner([]))[0]
    (table,) = overview.tables
    assert len(table.cells()) == len(overview.links) == 2


def test_the_summary_of_a_run_that_has_gone_on_since_is_not_shown_as_its_result(tmp_path):
    run = reported.write_run(tmp_path)
    of_30_steps = {"steps": 30, "tokens_per_s": 2048.0, "params_total": 7338240}
    reported.write_json(run / "summary.json", of_30_steps)
    assert "parameters" in page(tmp_path, run).texts and SeenRun(run).per_s == 2048.0
    with (run / "metrics.csv").open("a", encoding="utf-8") as rows:
        rows.write("39,5.5,,1024\n")
    assert "parameters" not in page(tmp_path, run).texts and SeenRun(run).per_s == 1024.0
