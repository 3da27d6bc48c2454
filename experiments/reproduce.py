import re
import sys

from experiments.table import TABLE_DEFAULTS
from experiments.tables.table_file import TableOptions, check_scale, load_table, table_names
from scmoe.command_line import call
from scmoe.config.installation import require
from scmoe.report import print_result, say


def main(
    *overrides: str, tables: list[str] | None = None, options: TableOptions = TABLE_DEFAULTS
) -> int:
    """Run all tables of the paper in turn, at one scale, and set our values beside the paper's.

    What each table costs is said first. Finished runs are skipped and interrupted ones are resumed,
    failed ones do not end it; Ctrl-C stops with a checkpoint of each. Standard output is JSON: rows
    with a result by table. Exit codes: 1, something failed; 2, the request was wrong; 130, stopped.

    Args:
        overrides: key=value, for every run
        tables: such as table3 (default: tables 1 to 7)
    """
    numbered = [name for name in table_names() if re.fullmatch(r"table\d+", name)]
    of_scale = [name for name in numbered if options.scale in load_table(name).scales]
    names = tables or of_scale or numbered
    for name in names:
        check_scale(load_table(name), options.scale)
    require("a table", "matplotlib", "scipy")
    from experiments.tables.make import reproduce

    if left := [name for name in numbered if name not in names and not tables]:
        say(f"without {', '.join(left)}, which have no scale {options.scale}")
    summary = reproduce(names, options, overrides)
    signal = summary.pop("signal")
    print_result(summary)
    if signal:
        return 130
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(call("reproduce", *sys.argv[1:]))
