"""What a table writes into its folder: results.json, table.md and charts, our values beside the
paper's."""

from collections.abc import Sequence
from pathlib import Path

from experiments.tables.results import results
from experiments.tables.table_chart import draw_equal_time, draw_table
from experiments.tables.table_file import PaperTable
from experiments.tables.table_page import markdown
from experiments.tables.table_runs import Run
from scmoe.files import write_text_whole, write_whole


def write_report(table: PaperTable, scale: str, runs: Sequence[Run], command: str) -> list[Path]:
    """Write the files of a table that has at least one finished run, as far as its runs have come.

    command: the one that makes the table."""
    folder = runs[0].job.study
    content = results(table, scale, runs, command)
    write_whole(folder / "results.json", content)
    write_text_whole(folder / "table.md", markdown(content))
    draw_table(content, folder / "chart.png")
    names = ["table.md", "results.json", "chart.png"]
    if len(content["equal_time"]) > 1:  # a speed has been measured
        draw_equal_time(content, folder / "equal_time.png")
        names.append("equal_time.png")
    return [folder / name for name in names]
