"""Figures are drawn from runs and reports, can be read on a phone, and say what they cannot be
drawn from."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.bench import speed_chart
from experiments.bench.overlap.rounds import Measurement, PlannedRow
from experiments.bench.overlap.row_figures import over_best_finalist
from experiments.bench.overlap.speedups import summary
from experiments.bench.pairs import ROWS, default_schedule, usual_rows
from experiments.bench.rank_bench import VariantTimes
from experiments.bench.setting import Setting
from experiments.bench.stacks import Variant
from experiments.figures.measured import SCENARIOS, module_share, read_reports
from scmoe.command_line import call
from scmoe.config.as_yaml import to_yaml
from scmoe.config.load import load_config
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.planning.pricing import OPERATORS, STREAM
from scmoe.predict.row_names import name_of
from scmoe.schedule.cost import OperatorTimes
from tests.support.pictures import assert_readable, assert_values_off_the_bars

ROOT = Path(__file__).parents[3]
# as `make figure8`
SHOWN = tuple(row for row in usual_rows(2) if "pos1" not in row and "pos3" not in row)
ROUNDS = np.array([1.0, 1.25, 1.5])  # a machine that slows down: ratios are the same in every round


def seconds(forward: float, train: float) -> VariantTimes:
    return VariantTimes(
        forward=forward * ROUNDS,
        train=train * ROUNDS,
        train_forward=train * ROUNDS / 3,
        cpu_forward=forward * ROUNDS,
        update=0 * ROUNDS,
    )


def report_of(share: float, rows: tuple[str, ...] = SHOWN, **setting: Any) -> dict:
    """Return what `bench overlap` reports of a top-2 pair of 1 s forward and 2.5 s in training.

    ScMoE hides everything. Other rows are as slow as sequential top-2. Operators of top-2 take 0.1
    s each.
    """
    asked = Setting(share, rows=rows, **setting)
    times, measured = {}, {}
    operators = {op: 0.1 if op in STREAM else 0.0 for op in OPERATORS}
    for row in rows:
        block, (chunks, *_) = ROWS[asked.every][row]
        schedule = default_schedule(block)
        for way in ("sequential", "free", "alone"):
            times[Variant(block, schedule, way)] = (
                seconds(1.0, 2.5) if way == "sequential" else seconds(1 - share, 2.3)
            )
        layer = LayerChoice(
            schedule, {n: OperatorTimes(operators, operators) for n in (1, chunks)}, (1.0, 2.0)
        )
        choice = ModelChoice((layer,) * asked.moe_blocks)
        best = Variant(block, schedule, f"own {row}")
        times[best] = seconds(1 - share, 2.3) if row.startswith("scmoe") else seconds(1.0, 2.5)
        measured[row] = PlannedRow(choice, best, [best], best, peak_mb=1.0)
    gradients = {asked.block_of(row): [(0.5, 2**20)] for row in rows}
    found = Measurement(asked, 100.0, measured, times, gradients, iterations=9)
    return summary(found)


def test_ratios_of_a_report_are_those_of_its_times():
    """ScMoE hides all communication. Without it the pair takes 1 - 0.52 s forward and 2.3 of 2.5 s
    in training."""
    report = report_of(0.52)
    hidden, exposed = report["rows"]["scmoe_pos2"], report["rows"]["shared_expert"]
    assert (report["comm_share"], report["limit_forward"]) == (
        pytest.approx(0.52),
        pytest.approx(1 / 0.48),
    )
    assert report["limit_train"] == pytest.approx(2.5 / 2.3)
    assert (hidden["forward_speedup"], hidden["train_speedup"]) == (
        pytest.approx(1 / 0.48),
        pytest.approx(2.5 / 2.3),
    )
    assert hidden["forward_quartiles"] == pytest.approx([1 / 0.48] * 2), (
        "ratios are taken round by round"
    )
    assert [hidden["overlap_forward"], exposed["overlap_forward"]] == pytest.approx([1, 0])
    assert (exposed["forward_speedup"], exposed["train_speedup"]) == (1, 1)
    assert (hidden["forward_ms"], hidden["train_ms"]) == (
        pytest.approx(1250 * 0.48),
        pytest.approx(1250 * 2.3),
    )


def test_luck_in_half_of_the_rounds_makes_no_schedule_the_best():
    """All three take 1 s; each of the other two is 20 % faster in some rounds and slower in the
    others."""
    even, block, schedule = np.array([1, 0, 1, 0, 1, 0]), "top2", default_schedule("top2")
    trains = {"own": 1.0 + 0 * even, "early": 1.2 - 0.4 * even, "late": 0.8 + 0.4 * even}
    variants = {name: Variant(block, schedule, name) for name in trains}
    times = {
        variants[name]: VariantTimes(train, train, train, train) for name, train in trains.items()
    }

    choice, finalists = variants["own"], list(variants.values())
    assert over_best_finalist(choice, finalists, times) < 1
    times[variants["early"]] = VariantTimes(*[0.8 + 0 * even] * 4)
    assert over_best_finalist(choice, finalists, times) == pytest.approx(1.25), (
        "a schedule that is faster in every round"
    )


def write_report(folder: Path, share: float, **changes: object) -> Path:
    path = folder / f"overlap-{share:g}.json"
    path.write_text(json.dumps({**report_of(share), **changes}))
    return path


@pytest.fixture
def reports(tmp_path):
    for scenario in SCENARIOS:
        write_report(tmp_path, scenario.pair_share)
    return tmp_path


def write_run(folder: Path, *overrides: str, layers: int = 3, modules: int = 12) -> Path:
    """Write the directory of a run that has measured Fig. 9 and 10 at three steps."""
    (folder / "analysis").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        to_yaml(load_config(ROOT / "configs/debug.yaml", overrides))
    )
    random, steps = np.random.default_rng(0), [0, 50, 100]
    labels = [f"MoE layer {i}" for i in range(layers)]
    values = random.random((3, layers, 4))
    np.savez(folder / "analysis/gating.npz", steps=steps, labels=labels, values=values)
    names = ["input", *(f"{i // 2} {'MLP' if i % 2 else 'attention'}" for i in range(modules))]
    matrices = np.cos(0.1 * np.abs(np.subtract.outer(range(len(names)), range(len(names)))))
    np.savez(
        folder / "analysis/similarity.npz",
        steps=steps,
        labels=names,
        values=np.stack([matrices] * 3),
    )
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Return a list of all figures that are saved."""
    found, save = [], Figure.savefig

    def keep(figure: Figure, *args: object, **words: object) -> None:
        save(figure, *args, **words)
        found.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def files(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Path]:
    """Run the command and return its files by suffix."""
    assert call("figure", *words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["figure"] == int(words[0])
    return {Path(name).suffix: Path(name) for name in summary["files"]}


@pytest.mark.parametrize("number", [1, 8])
def test_reports_become_a_figure_beside_them(number, reports, drawn, capsys):
    found = files(capsys, str(number), str(reports))
    assert found[".png"] == reports / f"figure-{number}.png"
    assert found[".png"].read_bytes().startswith(b"\x89PNG") and found[
        ".pdf"
    ].read_bytes().startswith(b"%PDF")
    assert_readable(drawn[0])


def test_figure_8_compares_the_rows_that_a_report_has(tmp_path, drawn, capsys):
    path = write_report(tmp_path, 0.52)
    path.write_text(json.dumps(report_of(0.52, ("top2", "shared_expert", "scmoe_pos2"))))
    files(capsys, "8", str(path))
    words = drawn[0].axes[0].get_title("left").splitlines()
    assert len(words) == 3 and words[-1].endswith("(paper: 1.27)")


@pytest.mark.parametrize(
    ("number", "modules"),
    [
        (9, 4),
        pytest.param(9, 48, marks=pytest.mark.faults),
        pytest.param(10, 4, marks=pytest.mark.faults),
        (10, 48),
    ],
)
def test_a_run_becomes_a_figure_in_its_folder(number, modules, tmp_path, drawn, capsys):
    run = write_run(
        tmp_path / "run", "moe.architecture=dgmoe", layers=modules // 4, modules=modules
    )
    found = files(capsys, str(number), str(run))
    assert found[".png"] == run / f"analysis/figure-{number}.png" and found[".pdf"].exists()
    assert json.loads(found[".json"].read_text())["steps"] == [0, 50, 100]
    assert_readable(drawn[0])


@pytest.mark.faults
@pytest.mark.smoke
@pytest.mark.ranks
def test_fig_13_is_measured_and_drawn(tmp_path, capsys):
    small = ("--quick", "--architectures", "scmoe_pos2", "--tokens", "4", "--out", str(tmp_path))
    assert call("figure", "13", *small) == 0
    assert json.loads(capsys.readouterr().out)["equal_bits"]
    assert (tmp_path / "figure-13.png").exists()


@pytest.mark.parametrize("number", [4, 7])
def test_a_picture_of_the_docs_needs_no_source(number, tmp_path, drawn, capsys):
    assert files(capsys, str(number), "--out", str(tmp_path / "new")).keys() == {".png"}
    assert_readable(drawn[0])


def test_charts_of_the_bench_are_readable(tmp_path, drawn):
    speed_chart.draw(report_of(0.52, tuple(ROWS[2])), tmp_path / "overlap.png")
    speed_chart.draw(report_of(0.52, tuple(ROWS[1]), every=1), tmp_path / "every-1.png")
    assert len(drawn) == 2
    for figure in drawn:
        assert_readable(figure)
        assert_values_off_the_bars(figure)


def test_the_limit_of_top2_is_drawn_at_rows_of_as_much_computation():
    groups = speed_chart.speed_bars(report_of(0.52, tuple(ROWS[2])), "forward", None)
    without = {name for name, bars in groups.items() if all(bar.limit is None for bar in bars)}
    assert without == {name_of(row) for row in ("top1", "top3", "scmoe2")}
    assert all(
        bar.limit is not None
        for name, bars in groups.items()
        if name not in without
        for bar in bars
    )


def test_the_share_of_a_pair_follows_from_that_of_the_module():
    """The shared-expert rows have half of top-2's communication: 1 - 1 / 1.06 of the time, by Table
    2, and 1.35 by Table 1. The tables round to 0.01, which is 0.02 of the share."""
    pcie, nodes, nvlink = (scenario.pair_share for scenario in SCENARIOS)
    assert pcie == pytest.approx(2 * (1 - 1 / 1.35), abs=0.02)
    assert nvlink == pytest.approx(2 * (1 - 1 / 1.06), abs=0.02)
    assert nvlink < nodes < pcie


def test_a_report_has_what_the_figures_show(reports):
    """Ratios are taken round by round, so a machine that slows down does not change them."""
    scenario, report = next(iter(read_reports([reports]).items()))
    over = report["fastest_scmoe"]["over"]
    assert over["forward"]["top2"] == pytest.approx([1 / (1 - scenario.pair_share)] * 3)
    assert over["train"]["scmoe_pos2"] == pytest.approx([1.0] * 3)
    assert module_share(report, "forward") == pytest.approx(0.2 / 0.6), (
        "dispatch and combine, of six operators"
    )


def test_make_figure8_measures_every_scenario_and_every_row_that_the_paper_compares():
    line = subprocess.run(
        ["make", "--dry-run", "figure8"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [float(share) for share in re.search(r"for share in ([\d. ]+);", line)[1].split()] == [
        scenario.pair_share for scenario in SCENARIOS
    ]
    rows = re.search(r"--rows ([\w\s\\]+)", line)[1].replace("\\", " ").split()
    assert set(SHOWN) == set(rows) and {
        row for scenario in SCENARIOS for row in scenario.over
    } <= set(rows)


def test_what_a_figure_cannot_be_drawn_from_is_said_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", "moe.architecture=dense")
    (run / "analysis/gating.npz").unlink()
    (tmp_path / "no").mkdir()
    (tmp_path / "no.json").write_text("[]")
    other, twice = write_report(tmp_path, 0.3), write_report(tmp_path, 0.52)
    of_iteration = write_report(tmp_path, 0.11, level="iteration")
    in_every_block = write_report(tmp_path, 0.521, wanted_share=0.52, every=1)
    two_experts = write_report(tmp_path, 0.522, wanted_share=0.52, top_k=2)
    real = write_report(tmp_path, 0.421, wanted_share=0.42, compute="real")
    rows = write_report(tmp_path, 0.42)
    rows.write_text(json.dumps(report_of(0.42, ("top2", "top1"))))
    for words, message in (
        (["9", run], "analysis.gating_every is null"),
        (["9"], "Fig. 9 shows one run, and 0 are given"),
        (["10", tmp_path / "no"], "There is no run '"),
        (["7", run], "is a drawing without data"),
        (["1"], "none is there"),
        (["1", tmp_path / "no"], "none is there"),
        (["8", tmp_path / "no.json"], "is no report of bench overlap"),
        (["8", tmp_path / "gone.json"], "is no report of bench overlap"),
        (
            ["8", other],
            (
                "was measured at --share 0.3, allowed: 0.52 (8xA30-PCIe), 0.42 (16xA800, two"
                " nodes), 0.11"
            ),
        ),
        (["8", twice, twice], "is the second report at --share 0.52"),
        (["1", of_iteration], "is of --level iteration, allowed: block"),
        (["8", in_every_block], "is of --every 1, allowed: 2, as in the paper"),
        (["8", two_experts], "is of --top-k 2, allowed: 1, as in the paper"),
        (["8", twice, real], "has compute real, others emulated"),
        (["0", run], "Picture 0 is drawn from no source"),
        (["13", run], "Picture 13 is drawn from no source"),
        (["7", "--quick"], "Leave the options of 13 out"),
        (["8", rows], "has the rows top2, top1, but"),
    ):
        assert call("figure", *map(str, words)) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line, line


def test_a_report_of_the_loopback_device_has_no_values_of_the_paper():
    """No rate was searched there, so it emulates no machine."""
    assert "paper" in report_of(0.52)
    report = report_of(0.52, links="loopback")
    assert "paper" not in report
    assert speed_chart.printed_speedups(report) is None


def test_one_sequence_a_rank_has_no_values_of_the_paper():
    """Those of the paper are of many sequences a rank: in a pair, in an iteration, in prefill."""
    for level in ("block", "iteration"):
        assert "paper" in report_of(0.52, level=level, tokens=512, seq_len=256)
        assert "paper" not in report_of(0.52, level=level, tokens=512, seq_len=512)
    prefill = {"wanted_share": 0.52, "prompt": 512}
    assert speed_chart.printed_speedups(prefill | {"texts": 4}) == speed_chart.PAPERS[0.52]
    for report in (prefill, prefill | {"texts": 1}):
        assert speed_chart.printed_speedups(report) is None


def test_rows_of_more_routed_experts_have_no_limit_of_top2():
    """scmoe_pos2 is scmoe2 then."""
    report = report_of(0.52, ("top2", "shared_expert", "scmoe_pos2"), top_k=2)
    groups = speed_chart.speed_bars(report, "forward", None)
    limits = {name: bar.limit for name, (bar,) in groups.items()}
    assert limits.pop(name_of("top2")) is not None
    assert set(limits.values()) == {None}
