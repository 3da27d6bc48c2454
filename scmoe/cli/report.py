from pathlib import Path

from scmoe.command_line import Count


def main(*sources: str, to: Path = Path("report.html"), last: Count = 12) -> None:
    """Write one HTML page of runs, tables, benches and advice, to hand on.

    The page loads nothing and runs no script. It shows the pictures that runs, tables and benches
    have drawn, losses over tokens and over seconds, tables, environments and commands. The last
    line on standard output is its path.

    Args:
        sources: runs, folders, JSON files of table, bench, simulate or advise, or names of
            docs/results; none: the folder runs
        to: the page
        last: how many of the newest runs of a folder
    """
    from scmoe.config.installation import require

    require("report", "matplotlib")
    from scmoe import __version__
    from scmoe.report import say
    from scmoe.runs.html_report.page import write_page

    size = write_page(sources, to, last, __version__)
    say(f"{size / 1e6:.2f} MB")
    print(to)
