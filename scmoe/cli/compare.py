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
    from scmoe.config.installation import require, scmoe
    from scmoe.report import console
    from scmoe.runs.seen import ONE_LINE, open_run

    require("compare", "matplotlib")
    if not more:
        raise ConfigError(
            f"compare needs two or more runs, and {run!r} is one. Name another run;"
            f" {scmoe('runs')} lists them."
        )
    runs = [open_run(name) for name in (run, *more)]
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if out.is_dir() or out.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(
            f"--out is {str(out)!r}, which is no name of a picture. Give a file such as"
            " compare.png."
        )
    from scmoe.runs import compare

    letters = compare.run_letters(runs)
    gains = compare.gains_of_schedules(runs, letters)
    tables = (compare.results_table(runs, letters), compare.differences_table(runs, letters))
    console(ONE_LINE, stderr=False).print(*tables, *gains, sep="\n")
    try:
        compare.draw(runs, compare.run_labels(runs, letters), out)
    except OSError as error:
        raise ConfigError(
            f"--out is {str(out)!r}, which cannot be written: {error.strerror}. Give another file."
        ) from error
    print(out)
