import sys

from experiments.tables.table_file import TableOptions, check_scale, load_table
from scmoe.command_line import call
from scmoe.config.installation import require
from scmoe.files import read_json
from scmoe.report import print_result, say

TABLE_DEFAULTS = TableOptions()


def main(table: str, /, *overrides: str, options: TableOptions = TABLE_DEFAULTS) -> int:
    """Run a table of the paper and set our values beside the paper's.

    Finished runs are skipped and interrupted ones are resumed; Ctrl-C stops with a checkpoint of
    each. The files are in <runs_dir>/tables/<table>-<scale>; standard output is a summary as JSON.
    Exit codes: 1, a run failed; 2, the request was wrong; 130, stopped.

    Args:
        table: a folder of configs/experiment with a table.yaml, such as table3
        overrides: key=value, for every run
    """
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
    results_file = plan.folder / "results.json"
    if read.decision is not None and results_file.exists():
        summary |= read_json(results_file)["decision"]
    print_result(summary)
    if outcome.signal:
        return 130
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(call("table", *sys.argv[1:]))
