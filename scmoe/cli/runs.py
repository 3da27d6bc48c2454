from pathlib import Path

from scmoe.command_line import Count
from scmoe.config.leaves import ConfigError


def main(folder: Path = Path("runs"), /, *, last: Count = 30) -> None:
    """List the runs of a folder, the newest first: state, best loss, speed, and how their configs
    differ.

    Best loss is the lowest val/loss; tokens/s is the summary's value, or the last logged one.
    "differs in" shows what differs from more than half of the runs shown of the same experiment:
    those of one name, one sweep or one table.

    Args:
        folder: where to look
        last: how many of the newest
    """
    from scmoe.report import console
    from scmoe.runs.seen import ONE_LINE, find_runs, readable, runs_table

    if not folder.is_dir():
        raise ConfigError(f"the folder of runs, {str(folder)!r}, does not exist. Give another one")
    runs = find_runs(folder)
    shown = readable(runs[:last])
    console(ONE_LINE, stderr=False).print(
        runs_table(shown, folder), f"{len(shown)} of {len(runs)} runs in {folder}", sep="\n"
    )
