"""The panel of a run's summary says what was measured where."""

from io import StringIO

from rich.console import Console

from scmoe.training.run.summary import summary_panel


def test_the_summary_says_what_is_of_the_validation_and_what_of_the_training():
    loads = {
        "load_max_ratio": 2.1,
        "drop_share": 0.25,
        "step_load_max": 1.5,
        "rank_load_max": 1.2,
        "step_drop": 0.125,
    }
    others = dict.fromkeys(("val_loss", "tokens_per_s", "model_tflops"))
    summary = {
        **loads,
        **others,
        "steps": 4,
        "steps_here": 4,
        "world_size": 1,
        "ep_size": 1,
        "skipped": 0,
        "run_dir": "runs/a",
    }
    with (printed := Console(width=200, file=StringIO())).capture() as shown:
        printed.print(summary_panel(summary, []))
    lines = shown.get().splitlines()
    for number, part in (
        ("2.10", "validation"),
        ("25.00%", "validation"),
        ("1.50", "training"),
        ("12.50%", "training"),
    ):
        (line,) = [line for line in lines if number in line]
        assert part in line
    assert "on 1 rank," in shown.get()
    idle = {**summary, **dict.fromkeys(("step_load_max", "rank_load_max", "step_drop"))}
    with printed.capture() as shown:
        printed.print(summary_panel({**idle, "steps_here": 0}, []))
    assert "no step was left to do" in shown.get() and "too few steps" not in shown.get()
