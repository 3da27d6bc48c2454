"""A sweep's report says which trial was best, and shows failed ones."""

from matplotlib.figure import Figure

from scmoe.config.load import load_config
from scmoe.sweeps.search import Trial, best
from scmoe.sweeps.sweep_report import draw, table, write_report
from tests.support.pictures import assert_readable
from tests.support.sweeps import trial


def test_the_report_says_which_was_best(sweep_of, tmp_path):
    sweep = sweep_of()
    failed = trial(4, state="failed")
    failed.reason = "FloatingPointError: [no] | number"
    trials = [trial(1, 3), trial(2, 9, 1), trial(3, 9, 2), failed]
    assert best(sweep, trials) is trials[1]
    assert list(table(sweep, trials).rows) == ["2", "3", "1", "4"]
    sweep.folder.mkdir(parents=True)
    summary = write_report(sweep, trials)
    assert {key: summary[key] for key in ("trials", "finished", "failed")} == {
        "trials": 4,
        "finished": 3,
        "failed": 1,
    }
    assert (summary["best"]["trial"], summary["best"]["val/loss"]) == (2, 1)
    lines = (sweep.folder / "results.csv").read_text().splitlines()
    assert lines[0] == "trial,state,optim.lr,moe.combine,val/loss,steps,seconds,run_dir,reason"
    assert lines[2].startswith("2,finished,0.01,cg1,1,2,")
    assert "FloatingPointError: [no] / number |" in table(sweep, trials).markdown()
    config = load_config(summary["best"]["config"])
    assert (config.optim.lr, config.name) == (0.01, "debug")
    assert (sweep.folder / "chart.png").exists()
    for results in (trials, [failed], []):
        path = tmp_path / f"{len(results)}.png"
        draw(sweep, results, path)
        assert path.stat().st_size > 5_000, "drawn, also without results"


def test_a_failed_trial_stands_at_its_own_category(sweep_of, tmp_path, monkeypatch):
    """Only the finished trial sets the range of numbers; a category has its place whether its
    trials fail or not."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    path = "scmoe:no-such-file/of/any/model"
    sweep = sweep_of(method="grid", parameters={"init_from": {"values": [None, path]}})
    states = {None: "finished", path: "failed"}
    trials = [
        Trial(i, {}, {"init_from": value}, state, [3.0], 3)
        for i, (value, state) in enumerate(states.items())
    ]
    draw(sweep, trials, tmp_path / "chart.png")
    (panel,) = figures[0].axes
    (failed,) = [dots for dots in panel.collections if dots.get_label() == "failed"]
    names = [label.get_text().replace("\n", "") for label in panel.get_xticklabels()]
    assert names[round(failed.get_offsets()[0, 0])] == path
    assert_readable(figures[0])
