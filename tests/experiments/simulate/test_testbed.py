"""`scmoe simulate testbed`: a calibration predicts the times that it was made from, and reports
that the simulator has made are predicted without error by every check."""

import json
from dataclasses import replace

import pytest

from experiments.bench.overlap.limits import PAYLOAD
from experiments.bench.setting import Setting
from experiments.simulate.reports import (
    LAUNCH_S,
    Calibration,
    operators_of,
    read_reports,
    setting_of,
    tax_of,
)
from experiments.simulate.rows import predict_row, predict_sequential
from experiments.simulate.testbed_checks import CHECKS, OVER_BALANCED
from scmoe.command_line import call
from scmoe.schedule.play import TRANSFERS

FORWARD_MS = {"route": 2, "encode": 1, "dispatch": 80, "experts": 30, "combine": 84, "decode": 2}
TRAIN_MS = {name: 2 * ms if name in TRANSFERS else 3 * ms for name, ms in FORWARD_MS.items()}
PAIR_MS = 145  # with free links: two attentions of 47.5, an MLP of 15, a module of 35
ROWS = ("top2", "shared_expert", "scmoe_pos2", "scmoe_pos2_pipelined")


def calibration_of(setting: Setting, link_mbit: float) -> Calibration:
    """Return the calibration at 220 Mbit/s, on links with another rate."""
    pairs = setting.moe_blocks
    free_s = pairs * PAIR_MS / 1e3
    update_s = 0.01 if setting.level == "iteration" else 0.0
    halves = 1.2 * free_s, 2.2 * free_s
    operators = operators_of(setting, 220.0, {"forward": FORWARD_MS, "train": TRAIN_MS})
    at_220 = Calibration(setting, operators, free_s, 2 * free_s, update_s, 220.0, 0.0, halves)
    return at_220.with_rate(link_mbit)


@pytest.mark.parametrize("level", ["block", "iteration"])
def test_a_calibration_predicts_the_blocks_that_it_was_made_from(level):
    """Launches count as computation, and a link saves a whole burst between two transfers."""
    setting = Setting(level=level)
    calibration = calibration_of(setting, 220.0)
    predicted = predict_sequential(calibration, None)
    launches = 2 * setting.moe_blocks * LAUNCH_S
    transfers = setting.moe_blocks * (80 + 84) / 1e3 - launches
    free_forward = calibration.free_forward + launches
    assert predicted.free_forward == pytest.approx(free_forward)
    assert predicted.forward == pytest.approx(free_forward + transfers)
    free_step = free_forward + calibration.free_backward + launches + calibration.update
    assert predicted.free_train == pytest.approx(free_step)
    if level == "block":
        assert predicted.train == pytest.approx(free_step + 2 * transfers)
    else:  # sums of gradients are behind backward too
        assert predicted.train > free_step + 2 * transfers


def test_halves_without_transfers_take_what_was_measured():
    calibration = calibration_of(Setting(), 220.0)
    predicted = predict_row(calibration, "top2_two", False, None)
    forward, backward = calibration.in_halves
    launches = 4 * LAUNCH_S
    assert predicted.free_forward == pytest.approx(forward + launches)
    assert predicted.free_train == pytest.approx(forward + backward + 2 * launches)


def test_a_slower_link_has_longer_transfers_of_the_same_processor_time():
    fast = replace(calibration_of(Setting(), 220.0), tax=0.1)
    slow = fast.with_rate(110.0)
    for name in TRANSFERS:
        assert slow.operators.forward[name] == pytest.approx(2 * fast.operators.forward[name])
    busy = [each.tax * each.operators.forward["dispatch"] for each in (fast, slow)]
    assert busy[0] == pytest.approx(busy[1])
    assert slow.burst == pytest.approx(2 * fast.burst)
    assert slow.sublayers == fast.sublayers


def test_a_small_transfer_was_measured_without_its_bytes():
    """They passed at once: only the launch was measured, or less."""
    setting = Setting(tokens=32)
    link_mbit = 220.0
    for ms in (1.0, 0.5):
        times = {"forward": FORWARD_MS | {"dispatch": ms}, "train": TRAIN_MS}
        dispatch = operators_of(setting, link_mbit, times).forward["dispatch"]
        rows = 2 * 32 * (1 - 1 / setting.ranks) * setting.dim * 4
        by_rate = rows / (link_mbit * 1e6 / 8 * PAYLOAD)
        assert dispatch == pytest.approx(by_rate - (1.0 - ms) / 1e3)
    fast = operators_of(
        setting, 1e6, {"forward": FORWARD_MS | {"dispatch": 0.1}, "train": TRAIN_MS}
    )
    assert fast.forward["dispatch"] == 0.0


def test_the_tax_is_the_processor_time_without_launches():
    setting = Setting(compute="real")
    operators = calibration_of(setting, 220.0).operators
    transfers_s = operators.forward["dispatch"] + operators.forward["combine"]
    report = {"transfer_cpu_ms_forward": 2.0 + 0.05 * 1e3 * transfers_s}
    assert tax_of(setting, report, operators) == pytest.approx(0.05)
    assert tax_of(setting, {"transfer_cpu_ms_forward": 1.0}, operators) == 0.0
    assert tax_of(Setting(), report, operators) == 0.0


def report_of(setting: Setting, link_mbit: float, rows: tuple[str, ...], load: str | None = None):
    """Return a report whose rows are what the simulator says, as `bench overlap` writes it."""
    calibration = calibration_of(setting, link_mbit)
    sequential = predict_sequential(calibration, load)
    made = {name: predict_row(calibration, name, False, load) for name in rows}
    figures = {}
    for name, row in made.items():
        figures[name] = {
            "forward_ms": 1e3 * row.forward,
            "train_ms": 1e3 * row.train,
            "forward_speedup": sequential.forward / row.forward,
            "train_speedup": sequential.train / row.train,
            "inside_gain": None,
            "forward_quartiles": [1.0, 1.0],
            "train_quartiles": [1.0, 1.0],
            **dict.fromkeys(("overlap_forward", "overlap_backward", "auto_over_best"), 1.0),
            **dict.fromkeys(("slot", "auto_slot"), 0),
            **dict.fromkeys(("chunks", "auto_chunks"), 1),
            **{"peak_mb": 1.0, "links": "shaped", "compute": "real"},
        }
        if load is not None:
            even = predict_row(calibration, name, False, None)
            over = ("forward", "straggler_forward", "straggler_train", "dropped")
            figures[name] |= {
                "over_balanced_forward": row.forward / even.forward,
                "over_balanced_train": row.train / even.train,
                "over_balanced_quartiles": [1.0, 1.0],
                **dict.fromkeys(over, None),
                **dict.fromkeys([f"max_over_mean_{of}" for of in ("ranks", "experts")], 1.7),
                "max_over_mean_tokens": 1.0,
            }
    content = {
        "comm_share": 1 - sequential.free_forward / sequential.forward,
        "link_mbit": link_mbit,
        "ranks": setting.ranks,
        "device": "cpu",
        "compute": setting.compute,
        "level": setting.level,
        "layers": setting.layers,
        "rows_over_gradients": 3.0,
        "transfer_cpu_ms_forward": 0.0,
        "top2_operators_ms": {"forward": FORWARD_MS, "train": TRAIN_MS},
        "calibration": {
            "sizes": {"tokens": setting.tokens, "dim": setting.dim, "ffn_dim": setting.ffn_dim},
            "operators_ms": operators_ms_of(calibration),
            "free_forward_ms": 1e3 * calibration.free_forward,
            "free_backward_ms": 1e3 * calibration.free_backward,
            "update_ms": 1e3 * calibration.update,
            "free_in_halves_ms": {
                "forward": 1.2e3 * calibration.free_forward,
                "backward": 1.1e3 * calibration.free_backward,
            },
        },
        "rows": figures,
    }
    if load is None:
        return content
    of_load = {"load": {"name": load, "max_over_mean_ranks": 1.7}, "layout": "dropless"}
    return {"loads": [content | of_load]}


def operators_ms_of(calibration: Calibration):
    """Return the operators as a report has them: transfers with a launch, after an idle time."""
    forward = {name: 1e3 * s for name, s in calibration.operators.forward.items()}
    backward = {name: 1e3 * s for name, s in calibration.operators.backward.items()}
    for transfer in TRANSFERS:
        forward[transfer] += 1e3 * (LAUNCH_S - calibration.burst)
        backward[transfer] = forward[transfer]
    return {"forward": forward, "train": {name: s + backward[name] for name, s in forward.items()}}


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a report for each check."""
    emulated, real = Setting(), Setting(compute="real")
    iteration = Setting(level="iteration")
    halves = ("top2", "top2_two", "scmoe_pos2_two_pipelined")
    reports = {
        "emulated-220": report_of(emulated, 220.0, ROWS),
        "emulated-500": report_of(emulated, 500.0, ROWS),
        "below/real-220": report_of(real, 220.0, ROWS),
        "below/real-900": report_of(real, 900.0, ROWS),
        "iteration-220": report_of(iteration, 220.0, ROWS),
        "iteration-500": report_of(iteration, 500.0, ROWS),
        "load": report_of(emulated, 220.0, ROWS, "hot_rank:1.7"),
        "halves": report_of(replace(emulated, layers=4), 220.0, halves),
    }
    for name, report in reports.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report), encoding="utf-8")
    (tmp_path / "another-bench.json").write_text('{"rows": {}}', encoding="utf-8")
    return tmp_path


def test_every_check_predicts_reports_that_the_simulator_made(folder, capsys):
    assert call("simulate", "testbed", str(folder)) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["not_measured"] == {}
    for check in CHECKS:
        cells = [cell for cell in report["cells"] if cell["check"] == check.name]
        assert {cell["quantity"] for cell in cells} >= {*check.bounds}
        for cell in cells:
            assert cell["predicted"] == pytest.approx(cell["measured"], rel=1e-6), cell
    shares = [cell for cell in report["cells"] if cell["check"].endswith("other share")]
    assert all(cell["calibrated_on"].endswith("-220") for cell in shares)
    assert not any(cell["report"].endswith("-220") for cell in shares)
    assert OVER_BALANCED in report["max_error_unseen"]["pair under load"]


def test_a_report_that_contradicts_itself_calibrates_nothing(folder, capsys):
    path = folder / "halves.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["calibration"]["free_forward_ms"] = 60.0  # its two modules alone take 70
    path.write_text(json.dumps(content), encoding="utf-8")
    (refused,) = (report for report in read_reports(folder) if report.refused)
    assert refused.name == "halves"
    assert refused.calibration is None
    call("simulate", "testbed", str(folder))
    assert "halves calibrates nothing" in capsys.readouterr().err


def test_a_report_without_sizes_has_the_usual_sizes_of_its_level():
    report = {"level": "iteration", "ranks": 4, "compute": "real", "tokens": 320, "dim": 128}
    setting = setting_of(report)
    assert (setting.tokens, setting.ffn_dim) == (320, 512)
    assert setting.layers == Setting(level="iteration").layers
    assert setting.seq_len == Setting(level="iteration").seq_len


@pytest.mark.parametrize(("layout", "is_read"), [("capacity:1", True), ("capacity:2", False)])
def test_a_balanced_report_of_another_layout_is_left_out(layout, is_read, folder):
    path = folder / "emulated-500.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"layout": layout}
    path.write_text(json.dumps(content), encoding="utf-8")
    names = [report.name for report in read_reports(folder)]
    assert ("emulated-500" in names) is is_read
