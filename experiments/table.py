"""Run a table of the paper and set our values beside the paper's.

Finished runs are skipped and interrupted ones are resumed; Ctrl-C stops with a checkpoint of each. The files are in
<runs_dir>/tables/<table>-<scale>; the last line on standard output is a summary as JSON.
Exit codes: 1, a run failed; 2, the request was wrong; 130, stopped.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from scmoe.experiments import command, module_of, parser

if TYPE_CHECKING:
    from scmoe.studies.table.make import Commands, Request


def add_options(options: ArgumentParser) -> None:
    """Add the options that `table` and `reproduce` share."""
    option = options.add_argument
    option("--scale", default="smoke", help="smoke | small | paper, as in table.yaml (default: smoke)")
    option("--jobs", type=int, help="number of runs in parallel; 0: all in this process")
    option("--seeds", type=int, help="seeds 1 to this")
    option(
        "--from",
        dest="source",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="take the results of runs of equal configuration from FOLDER, such as docs/results",
    )
    option("--to", type=Path, metavar="FOLDER", help="copy results and states of finished runs into FOLDER")
    option("overrides", metavar="key=value", nargs="*", help="for every run")


def read_request(given: Namespace) -> "Request":
    from scmoe.config.extras import require
    from scmoe.config.load import load

    require("a table", "matplotlib", "scipy")
    from scmoe.studies.table.make import Request

    runs_dir = load(
        None, [word for word in given.overrides if word.removeprefix("--").startswith("runs_dir=")]
    ).runs_dir
    sources = [Path(runs_dir) / "tables", *given.source]  # tables have rows in common
    return Request(given.scale, given.overrides, given.jobs, given.seeds, sources, given.to)


def commands() -> "Commands":
    from scmoe.experiments.train import main as train
    from scmoe.studies.runs import console
    from scmoe.studies.table.make import Commands

    screen = console()

    def evaluate(arguments: list[str]) -> int:
        return import_module(module_of("evaluate")).main(arguments)

    def say(line: str) -> None:
        screen.print(line, soft_wrap=True, markup=False)

    return Commands(train, evaluate, say)


@command
def main(arguments: list[str]) -> int:
    options = parser("table", __doc__)
    options.add_argument("table", help="a folder of configs/experiment with a table.yaml, such as table3")
    add_options(options)
    given = options.parse_intermixed_args(arguments)
    request = read_request(given)
    from scmoe.studies.table.make import make_table, plan_table
    from scmoe.studies.table.rows import load_table

    called = commands()
    plan = plan_table(load_table(given.table), request, called.say)
    seeds = len(plan.runs) // len(plan.table.rows)
    called.say(f"{plan.table.title}: {len(plan.table.rows)} rows x {seeds} seeds, in {plan.folder}")
    made = make_table(plan, request, called)
    for path in made.files:
        called.say(str(path))
    if made.signal:
        called.say("stopped; the same command resumes it")
    counts = {"finished": made.finished, "failed": made.failed, "cut": made.cut}
    last = {"table": plan.table.name, "scale": plan.scale_name, **counts, "folder": str(plan.folder)}
    print(json.dumps(last), flush=True)
    return 130 if made.signal else 1 if made.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
