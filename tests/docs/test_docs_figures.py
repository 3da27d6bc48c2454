"""Figures in prose are those of the reports, and words that judge them are true of them."""

import json
import re
from pathlib import Path

import pytest

from docs.build import one_sequence, readme, two_batches
from docs.build.pages import HEADLINE, PAGES, RESULTS, with_part
from experiments.bench.row import with_quartiles
from experiments.tables.equivalence import interval_of_answer
from experiments.tables.seed_statistics import compare
from scmoe.config.leaves import ConfigError

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TOKENS = "equal_tokens"
ONE_SEQUENCE = ("shared_expert", *two_batches.SHORTCUT_ROWS)
LONGEST = "one-sequence/overlap-real-iteration-2-ranks-share-0.52-tokens-3072-layers-8.json"
FIGURE = re.compile(r"(?<![\w.])-?\d+\.\d{2,}(?![\w.])")
NO_FIGURES = re.compile(
    r"```.*?```|\]\([^)]*\)|arXiv [\d.]+|Python [\d.]+ to [\d.]+", flags=re.DOTALL
)


@pytest.fixture
def facts():
    return readme.facts(ROOT / PAGES, ROOT / RESULTS, HEADLINE)


def answers() -> str:
    return readme.answers(ROOT / PAGES, ROOT / RESULTS, HEADLINE)


def test_every_figure_of_readme_comes_from_a_report():
    """`make figures` writes the answers; any other figure stands in the recorded terminal."""
    text = README.read_text(encoding="utf-8")
    assert answers() in text, "make figures writes the answers again"
    recorded = (ROOT / PAGES / "train.svg").read_text(encoding="utf-8")
    others = FIGURE.findall(NO_FIGURES.sub("", text.replace(answers(), "")))
    assert [figure for figure in others if figure not in recorded] == []


def test_the_words_of_readmes_answers_are_true(facts):
    """If one fails after a measurement, its answer in docs/build/readme.py needs other words."""
    same_model, other_models = facts["rivals"]
    low, high = facts["quartiles"]
    assert facts["pos3"].train_speedup > 0.9 * facts["limit_train"]
    assert facts["pos3"].forward_speedup > 0.9 * facts["limit_forward"]
    assert same_model == {"top2_two"} and facts["same"][0] > 1.05
    assert other_models == {"shared_expert_two"} and low < 1 < high
    assert facts["rows_over_gradients"] < 1 and facts["few_tokens"] < 0.95
    assert facts["large_share"] > 0.6 and facts["at_large_share"]["forward"] < 0.9
    for report in two_batches.read_reports(ROOT / PAGES, HEADLINE):
        if report["tokens"] <= 512:
            gain = report["rows"]["scmoe_pos2"]["over_best_without_another_model"]
            assert gain["train"]["median"] < 1
    longest = one_sequence.read_reports(ROOT / PAGES)[-1]
    for gain in longest["rows"]["scmoe_pos3"]["over_best_without_shortcut"].values():
        assert gain["best"] == "shared_expert_pipelined" and gain["quartiles"][0] > 1
    tested = facts["tested"]
    assert tested["top2"]["answer"] == tested["equal_size"]["answer"] == "higher"
    assert tested["shared"]["answer"] == "equal within 0.01", "it changes nothing"
    assert facts["widest"].low > 0, "it is behind a shared expert there"
    twin = readme.losses_of(readme.read(ROOT / RESULTS / readme.TABLE_3 / "results.json"), TOKENS)
    assert compare(twin[readme.POS2], twin[readme.TOP2])["p"] > 0.05, "no difference there"


def test_a_new_measurement_changes_readmes_answers(tmp_path):
    """Of each report that the answers read, a changed value reaches the text."""
    texts = {answers()}
    changes = {
        PAGES / f"{HEADLINE}.json": ("rows", "scmoe_pos3", "train_speedup"),
        PAGES / f"{readme.FEW_ROWS_REPORT}.json": ("rows", "scmoe_pos2", "train_speedup"),
        PAGES / LONGEST: ("rows", "scmoe_pos3", "over_best_without_shortcut", "train", "median"),
        RESULTS / readme.REGISTERED / "results.json": (
            *("decision", "rows", f"{readme.POS2} minus {readme.TOP2}", "difference"),
        ),
        RESULTS / readme.SHORTER / "results.json": (
            *("decision", "rows", readme.SHORTER_PAIR, "difference"),
        ),
        RESULTS / "trend-width-96/results.json": ("rows", 2, "ours", "by_seed", "1"),
    }
    for changed, (*keys, last) in changes.items():
        for path in changes:
            report = json.loads((ROOT / path).read_text(encoding="utf-8"))
            if path == changed:
                part = report
                for key in keys:
                    part = part[key]
                part[last] = 7.654
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(json.dumps(report), encoding="utf-8")
        texts.add(readme.answers(tmp_path / PAGES, tmp_path / RESULTS, HEADLINE))
    assert len(texts) == 1 + len(changes)


def test_the_second_day_of_the_headline_is_as_its_report_says():
    report = readme.read(ROOT / RESULTS / "headline-second-day.json")
    text = (ROOT / RESULTS / "README.md").read_text(encoding="utf-8")
    for over in ("over_best_without_another_model", "over_best_without_shortcut"):
        pos2, pos3 = (readme.gain_of(report, row, over) for row in two_batches.SHORTCUT_ROWS)
        assert f"{pos2} and {pos3} over" in text


def test_the_second_day_of_one_sequence_is_as_its_report_says():
    report = readme.read(ROOT / RESULTS / "one-sequence-second-day.json")
    kinds = ("train", "forward")
    gains = [
        readme.gain_of(report, "scmoe_pos3", "over_best_without_shortcut", kind) for kind in kinds
    ]
    page = (ROOT / RESULTS / "one-sequence.md").read_text(encoding="utf-8")
    assert "{} in training and {} in inference on".format(*gains) in page
    medians = " and ".join(gain.partition(" ")[0] for gain in gains)
    assert f"(another day: {medians})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_whole_trainings_of_one_sequence_are_as_their_report_says():
    report = readme.read(ROOT / RESULTS / "one-sequence-train.json")
    reached = [
        with_quartiles(report["rows"][row]["speedup"], report["rows"][row]["quartiles"])
        for row in ONE_SEQUENCE
    ]
    page = (ROOT / RESULTS / "one-sequence.md").read_text(encoding="utf-8")
    assert f"reach {', '.join(reached)} (shared expert, Pos-2, Pos-3)" in page


def test_prefill_of_one_prompt_is_as_its_report_says():
    """The page has the usual way of a shared expert, Pos-2 and Pos-3: one chunk."""
    report = readme.read(ROOT / PAGES / "inference-2-ranks-share-0.52-prompt-3072.json")
    rows = [report["rows"][row]["prefill"] for row in ONE_SEQUENCE]
    usual = ", ".join(f"{row['speedup']:.2f}" for row in rows)
    assert usual in (ROOT / RESULTS / "one-sequence.md").read_text(encoding="utf-8")


def test_the_page_of_the_registered_experiment_has_readmes_intervals(facts):
    page = (ROOT / RESULTS / readme.REGISTERED / "table.md").read_text(encoding="utf-8")
    for rival, tested in facts["tested"].items():
        low, high = interval_of_answer(tested)
        (line,) = [
            line
            for line in page.splitlines()
            if line.startswith(f"| {readme.POS2} minus {readme.REGISTERED_RIVALS[rival]} |")
        ]
        assert f"{low:+.4f} to {high:+.4f}" in line


def test_a_page_without_its_marks_is_refused(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# A page\n")
    with pytest.raises(ConfigError, match="0 parts that make figures writes"):
        with_part(page, "text")
