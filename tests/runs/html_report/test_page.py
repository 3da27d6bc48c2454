"""`scmoe report`: each input has its part, texts stay texts, keys and machines stay out, and what
cannot be shown is refused in one line."""

import gzip
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scmoe import __version__
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.runs.html_report.advice_part import part_of_advice
from scmoe.runs.html_report.layer_timelines import first_layer, measured_timelines
from scmoe.runs.html_report.page import write_page
from scmoe.runs.html_report.page_parts import number
from scmoe.runs.html_report.result_parts import refuse_form
from scmoe.runs.html_report.run_curves import over_seconds, read_loads
from scmoe.runs.html_report.sources import Cleaner, find_sources, read_file
from scmoe.runs.seen import SeenRun
from scmoe.schedule.cost import Span
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


def test_every_input_has_its_part_and_its_drawing(tmp_path):
    run = reported.write_run(tmp_path / "runs")
    table = reported.write_json(tmp_path / "results.json", reported.table())
    speeds = reported.write_json(tmp_path / "speeds.json", reported.speeds())
    advice = tmp_path / "advice.json"
    advice.write_text(f"a line before\n{json.dumps(reported.advice())}\n", encoding="utf-8")
    measured = {"title": "A *layer*", "rows": {"ours": {"ms": 1.5, "deep": {"gib": 2}}}}
    others = reported.write_json(tmp_path / "others.json", measured)

    seen = page(tmp_path, run, table, speeds, advice, others)
    expected = [
        "Would it pay?",
        "Results beside the paper's",
        "Speed-ups",
        "Measurements",
        "Runs",
        "Losses of quickstart",
        "Load of the experts by layer over time",
        "Timelines",
        "Environment and configuration",
    ]
    assert [heading for heading in seen.headings if heading in expected] == expected
    # advice: step times and speed-ups; table, speeds; losses; busiest experts, two layers; plan
    assert seen.elements.count("figure") == seen.elements.count("svg") - 1 == 4 + 4 + 3 + 1
    text = " ".join(seen.texts)
    for value in (
        "3.2248",
        "-0.0200",
        "1.43",
        "within the error",
        "0123456",
        "deep, gib",
        "2.00 x",
    ):
        assert value in text, value


def shown_advice(tmp_path: Path, advice: dict) -> tuple[str, list[list[str]]]:
    """Return the text of a page of an advice, and the rows of its first table."""
    path = reported.write_json(tmp_path / "advice.json", advice)
    seen = page(tmp_path, path)
    source = read_file(path, must=True)[0]
    return " ".join(seen.texts), [*part_of_advice(source, "advice-1").tables[0].cells]


def test_an_advice_names_its_job_and_what_its_answer_rests_on(tmp_path):
    text, (first, second) = shown_advice(tmp_path, reported.advice())
    for value in ("qwen3_moe", "8x8xH100-InfiniBand", "16,384", "hot_rank:1.7", "24%"):
        assert value in text, value
    assert "over top8" in text and "top-2" not in text and "top2" not in text
    assert "0.97 to 1.13" in first, "the interval on which the answer rests"
    assert first[1] == "within the error" and first[-1] == "1,300 tokens a rank are missing"
    assert second[1] == "pays, does not fit"
    assert "ScMoE (Pos-1), two batches in flight (does not fit the card)" in text
    assert "not stated" not in text


def test_an_older_advice_says_what_it_does_not_state(tmp_path):
    advice = reported.advice()
    del advice["job"]
    for row in advice["rows"].values():
        for key in ("fits", "other_ms", "over_best_interval"):
            del row[key]
    text, (first, _) = shown_advice(tmp_path, advice)
    # nine facts of the job, the intervals and the fits of two rows
    assert text.count("not stated") == 9 + 2 + 2
    assert first[1] == "within the error" and "over the standard model" in text
    assert "over top3, sequential" in shown_advice(tmp_path, advice | {"standard": "top3"})[0]


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    out = tmp_path / "report.html"
    write_page([str(reported.write_run(tmp_path / "runs"))], out, 12, __version__)
    text = out.read_text(encoding="utf-8")
    seen = Seen(text)
    assert not {"script", "link", "iframe"} & {*seen.elements} - {"link"}
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


def test_what_cannot_be_shown_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    bad = {"no.json": "", "text.json": "no JSON", "list.json": "[1]", "other.json": '{"a": 1}'}
    half = reported.table()
    del half["rows"][1]["ours"]
    bad["half.json"] = json.dumps(half)
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


def test_a_folder_shows_its_newest_runs_and_what_it_recognises(tmp_path):
    for day in (1, 2, 3):
        reported.write_run(tmp_path / "runs", stamp=f"2026112{day}-101500")
    reported.write_json(tmp_path / "runs" / "speeds.json", reported.speeds())
    reported.write_json(tmp_path / "runs" / "other.json", {"a": 1})
    sources, _ = find_sources([str(tmp_path / "runs")], 2)
    assert [run.path.name[:8] for run in sources.runs] == ["20261123", "20261122"]
    assert [source.kind for source in sources.files] == ["speeds"] and sources.skipped == 1


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
    trace = tmp_path / "runs" / "t.json.gz"
    trace.write_bytes(gzip.compress(b'{"traceEvents": []}')[:-9])
    foreign = reported.write_json(tmp_path / "runs" / "foreign.json", {"cells": [{"a": [1]}]})
    reported.write_json(tmp_path / "runs" / "empty.json", {"traceEvents": []})
    assert "Runs" in page(tmp_path, tmp_path / "runs").headings
    for named in (trace, foreign.with_name("empty.json")):
        with pytest.raises(ConfigError):
            page(tmp_path, named)


FILES_OF_A_RUN = (
    *("config.yaml", "config-from-3.yaml", "metrics.csv", "summary.json", "state.json"),
    *("env.json", "plan.json", "analysis/expert_load.csv", "traces/t.json"),
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
            for drawn in ("plan.json", "analysis/expert_load.csv"):  # drawing takes time
                (run / drawn).unlink()
            (run / file).parent.mkdir(exist_ok=True)
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
    assert f"{not_utf8}1700-lr-1e-3/analysis/expert_load.csv" in reports.err


def test_numbers_that_are_none_and_truths_are_shown():
    assert [number(value) for value in (math.inf, True, False, 1234.5, 3)] == [
        "inf",
        "yes",
        "no",
        "1,234",
        "3",
    ]


def test_a_report_of_several_loads_is_one_part_for_each(tmp_path):
    loads = [reported.speeds() | {"load": {"name": name}} for name in ("hot_rank:1.7", "recorded")]
    path = reported.write_json(tmp_path / "uneven.json", {"loads": loads})
    names = ["uneven: load hot_rank:1.7", "uneven: load recorded"]
    assert [source.name for source in read_file(path, must=True)] == names


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


def test_an_unknown_name_lists_those_that_exist(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    (docs / "figures/two-batches").mkdir(parents=True)
    (docs / "results").mkdir()
    for name in ("figures/two-batches/a", "figures/overlap-a", "results/layer"):
        reported.write_json(docs / f"{name}.json", reported.speeds())
    reported.write_json(docs / "results/conditions.json", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scmoe.runs.html_report.sources.CHECKOUT", tmp_path / "scmoe")
    with pytest.raises(ConfigError, match=r"or a result: layer, overlap-a, two-batches\.$"):
        find_sources(["xyz"], 1)
    with pytest.raises(ConfigError, match=r"or a result: two-batches\.$"):
        find_sources(["two_batch"], 1)
    sources, _ = find_sources(["two-batches"], 1)
    assert [source.path.name for source in sources.files] == ["a.json"]


def test_seconds_are_tokens_over_logged_speeds(tmp_path):
    """10 steps of 8 sequences of 256 tokens, at 2,048 tokens/s, take 10 s."""
    run = SeenRun(reported.write_run(tmp_path))
    assert [second for second, _ in over_seconds(run, "train/loss")] == pytest.approx([10, 20, 30])
    assert over_seconds(run, "val/loss") == [(pytest.approx(30), 6.25)]
    metrics = (run.path / "metrics.csv").read_text(encoding="utf-8").replace(",2048", ",")
    (run.path / "metrics.csv").write_text(metrics, encoding="utf-8")
    assert over_seconds(SeenRun(run.path), "train/loss") == []


def test_a_half_written_table_of_loads_is_read_up_to_its_last_whole_step(tmp_path):
    table = tmp_path / "expert_load.csv"
    table.write_text(reported.loads() + "39,0,10,10,10,10,0\n39,1,10,5", encoding="utf-8")
    loads = read_loads(table)
    assert loads is not None and loads.steps == [*reported.STEPS]
    assert loads.copies[1][-1] == [10, 5, 5, 20]


def test_a_transfer_of_a_trace_lasts_from_its_launch_to_the_end_of_its_wait():
    operators = [
        ("dispatch", 0.0, 0.1, 1),  # of the layer before
        ("route", 10.0, 11.0, 1),
        ("dispatch", 11.0, 11.1, 1),
        ("attention", 11.1, 15.0, 1),
        ("route", 12.0, 13.0, 2),  # another thread
        ("dispatch wait", 15.0, 16.0, 1),
        ("experts", 16.0, 18.0, 1),
        ("decode", 18.0, 19.0, 1),
        ("route", 20.0, 21.0, 1),
    ]
    spans = {span.operator: (span.start, span.end) for span in first_layer(operators)}
    assert spans["dispatch"] == (11.0, 16.0) and spans["decode"] == (18.0, 19.0)
    assert list(spans) == ["route", "attention", "dispatch", "experts", "decode"]
    assert first_layer([("attention", 0.0, 1.0, 1)]) == []
    (timeline,) = measured_timelines(operators).values()
    assert timeline[0] == Span("route", 0.0, 1.0)


def test_a_trace_of_two_batches_in_flight_has_a_timeline_for_each_half():
    operators = [
        ("batch 1", 10.0, 12.0, 1),
        ("route", 10.0, 11.0, 1),
        ("dispatch", 11.0, 11.5, 1),
        ("batch 2", 12.0, 14.0, 1),
        ("route", 12.0, 13.0, 1),
        ("dispatch", 13.0, 13.5, 1),
        ("batch 1", 14.0, 17.0, 1),
        ("dispatch wait", 14.0, 15.0, 1),
        ("decode", 15.0, 17.0, 1),
        ("batch 2", 17.0, 20.0, 1),
        ("dispatch wait", 17.0, 18.0, 1),
        ("decode", 18.0, 20.0, 1),
    ]
    first, second = measured_timelines(operators).values()
    assert [(s.operator, s.start, s.end) for s in first] == [
        ("route", 0.0, 1.0),
        ("dispatch", 1.0, 5.0),
        ("decode", 5.0, 7.0),
    ]
    assert [(s.operator, s.start, s.end) for s in second] == [
        ("route", 2.0, 3.0),
        ("dispatch", 3.0, 8.0),
        ("decode", 8.0, 10.0),
    ]


def test_a_named_trace_without_an_moe_layer_is_refused(tmp_path):
    event = {"ph": "X", "cat": "user_annotation", "name": "scmoe/mlp", "ts": 1, "dur": 2, "tid": 1}
    path = reported.write_json(tmp_path / "trace.json", {"traceEvents": [event, {"ph": "M"}]})
    with pytest.raises(ConfigError, match="no MoE layer"):
        write_page([str(path)], tmp_path / "report.html", 12, __version__)


@pytest.mark.parametrize("form", ["{x.__class__}", "{x:>9999}", "{x:{y}}", "{a[b].c}"])
def test_a_format_that_does_more_than_to_round_is_refused(form):
    with pytest.raises(ValueError, match="more than to round"):
        refuse_form(form)


def test_formats_of_stored_results_are_accepted():
    for form in ("{ms:.1f}", "{rows[real, 0.5 ms][ddp]:,}", "{a[0]:.2f}, {b} MiB"):
        refuse_form(form)


def test_colours_have_enough_contrast_in_light_and_dark():
    """WCAG's 4.5 for texts, which also covers their use in drawings."""
    light, dark = STYLE.read_text(encoding="utf-8").split("prefers-color-scheme: dark", 1)
    for mode in (light, dark.split("}", 1)[0]):
        colors = dict(re.findall(r"--(\w+): (#\w{6});", mode))
        for name in ("ink", "muted", *(f"c{i}" for i in range(1, 7))):
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


def test_nothing_to_report_names_what_is_allowed(tmp_path):
    with pytest.raises(ConfigError, match="a folder of runs"):
        find_sources([str(tmp_path)], 12)
