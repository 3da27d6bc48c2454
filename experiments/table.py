import re
import sys

from experiments.tables.table_file import TableOptions, check_scale, load_table, table_names
from scmoe.command_line import call
from scmoe.config.installation import require
from scmoe.files import read_json
from scmoe.report import print_result, say

TABLE_DEFAULTS = TableOptions()


def main(table: str, /, *overrides: str, options: TableOptions = TABLE_DEFAULTS) -> int:
    """Run a table of the paper, or all of them in turn, and set our values beside the paper's.

    Finished runs are skipped and interrupted ones are resumed; Ctrl-C stops with a checkpoint of
    each. The files are in <runs_dir>/tables/<table>-<scale>; standard output is a summary as JSON.
    For all, what each table costs is said first, and a failed run ends nothing. Exit codes: 1, a
    run failed; 2, the request was wrong; 130, stopped.

    Args:
        table: a folder of configs/experiment with a table.yaml, such as table3; all: those of the
            paper's tables 1 to 7 that have the scale
        overrides: key=value, for every run
    """
    if table == "all":
        return make_all(options, overrides)
    read = load_table(table)
    check_scale(read, options.scale)
    require("a table", "matplotlib", "scipy")
    from experiments.tables.make import make_table
    from experiments.tables.table_plan import plan_table

    plan = plan_table(read, options, overrides)
    seeds = len(plan.runs) // len(read.rows)
    say(f"{read.title}: {len(read.rows)} rows x {seeds} seeds, in {plan.folder}")
    outcome = make_table(plan)
    summary = {
        "table": read.name,
        "scale": plan.scale_name,
        "finished": outcome.finished,
        "failed": outcome.failed,
        "cut": outcome.cut,
        "folder": str(plan.folder),
    }
    if read.decision is not None and outcome.has_report:
        summary |= read_json(plan.folder / "results.json")["decision"]
    print_result(summary)
    return exit_code(outcome.signal, outcome.failed)


def make_all(options: TableOptions, overrides: tuple[str, ...]) -> int:
    """Make the paper's tables that have the scale, in turn. Standard output is JSON: rows with a
    result by table. Return the exit code, as `main`."""
    numbered = [name for name in table_names() if re.fullmatch(r"table\d+", name)]
    names = [name for name in numbered if options.scale in load_table(name).scales]
    if not names:
        check_scale(load_table(numbered[0]), options.scale)
    require("a table", "matplotlib", "scipy")
    from experiments.tables.make import make_tables

    if left := [name for name in numbered if name not in names]:
        say(f"without {', '.join(left)}, which have no scale {options.scale}")
    summary = make_tables(names, options, overrides)
    signal = summary.pop("signal")
    print_result(summary)
    return exit_code(signal, summary["failed"])


def exit_code(signal: int, failed: int) -> int:
    """Return the code of a call that a signal stopped (0: none), or of which so much failed."""
    if signal:
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(call("table", *sys.argv[1:]))
