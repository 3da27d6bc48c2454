from pathlib import Path

from scmoe.config.leaves import ConfigError


def main(run: str, /, *more: str, out: Path = Path("runs/compare.png")) -> None:
    """Compare runs: their curves over the tokens (images) they saw, and how their configs differ.

    The last line on standard output is the path of the picture.

    Args:
        run: directory of a run, or its path below runs/
        more: other runs
        out: picture
    """
    from scmoe.config.extras import require, scmoe
    from scmoe.runs.seen import console, open_run

    require("compare", "matplotlib")
    if not more:
        raise ConfigError(
            f"compare needs two or more runs, and {run!r} is one. Name another run;"
            f" {scmoe('runs')} lists them."
        )
    runs = [open_run(name) for name in (run, *more)]
    from scmoe.runs.compare import differences_table, draw, gains_of_schedules, results_table

    letters = [chr(ord("a") + i) if i < 26 else str(i + 1) for i in range(len(runs))]
    gains = gains_of_schedules(runs, letters)
    console().print(
        results_table(runs, letters), differences_table(runs, letters), *gains, sep="\n"
    )
    draw(runs, letters, out)
    print(out)
