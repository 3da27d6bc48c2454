"""This sweep file has every kind of key. Tests change one key at a time, or make trials of it."""

from pathlib import Path

from scmoe.sweeps.search import Trial

ROOT = Path(__file__).parents[2]
GOOD = {
    "program": "scmoe/__main__.py",
    "command": [
        *("${env}", "${interpreter}", "-m", "scmoe", "train"),
        *(str(ROOT / "configs/debug.yaml"), "trainer.max_steps=3", "${args_no_hyphens}"),
    ],
    "method": "random",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {
        "optim.lr": {"min": 1e-4, "max": 1e-2},
        "moe.combine": {"values": ["cg1", "cg2"]},
    },
    "run_cap": 3,
}


def trial(number: int, *history: float, state: str = "finished") -> Trial:
    parameters = {"optim.lr": 10.0**-number, "moe.combine": "cg1"}
    return Trial(
        number, {"optim.lr": 0.5, "moe.combine": 0}, parameters, state, list(history), len(history)
    )
