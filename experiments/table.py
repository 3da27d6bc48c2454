"""Run a table of the paper and set our values beside the paper's.

Finished runs are skipped and interrupted ones are resumed; Ctrl-C stops with a checkpoint of each. The files are in
<runs_dir>/tables/<table>-<scale>; the last line on standard output is a summary as JSON.
Exit codes: 1, a run failed; 2, the request was wrong; 130, stopped.
"""

import json
import sys
from pathlib import Path

from experiments import command, parser
from scmoe.config.fields import ConfigError


@command
def main(arguments: list[str]) -> int:
    options = parser("table", __doc__)
    options.add_argument("table", help="a folder of configs/experiment with a table.yaml, such as table3")
    options.add_argument("--scale", default="smoke", help="smoke | small | paper, as in table.yaml (default: smoke)")
    options.add_argument("--jobs", type=int, help="number of runs in parallel; 0: all in this process")
    options.add_argument("--seeds", type=int, help="seeds 1 to this")
    options.add_argument("overrides", metavar="key=value", nargs="*", help="for every run")
    given = options.parse_intermixed_args(arguments)
    from experiments.train import main as train
    from scmoe.config.load import load
    from scmoe.studies.runs import console
    from scmoe.studies.table.launch import write_launch_files
    from scmoe.studies.table.report import write_report
    from scmoe.studies.table.rows import load_table
    from scmoe.studies.table.runs import plan_runs, run_all

    table = load_table(given.table)
    if given.scale not in table.scales:
        raise ConfigError(f"--scale is {given.scale!r}, allowed: {', '.join(table.scales)}")
    scale = table.scales[given.scale]
    jobs, seeds = (scale.jobs if given.jobs is None else given.jobs), given.seeds
    seeds = scale.seeds if seeds is None else seeds
    if seeds < 1 or (jobs or 0) < 0:
        raise ConfigError(f"--seeds is {seeds}, --jobs is {jobs}, allowed: 1 or more, 0 or more")
    folder = Path(load(scale.config, given.overrides).runs_dir) / "tables" / f"{given.table}-{given.scale}"
    runs = plan_runs(table, scale, folder, seeds, given.overrides)
    if jobs is None:
        print(f"{given.scale} is not run here; start it elsewhere with one of:", *write_launch_files(runs), sep="\n  ")
        return 0

    def say(line: str) -> None:
        screen.print(line, soft_wrap=True, markup=False)

    screen = console()
    say(f"{table.title}: {len(table.rows)} rows x {seeds} seeds, in {folder}")
    stopped = run_all(runs, jobs, table.metric, train)
    counts = {status: sum(run.state.status == status for run in runs) for status in ("finished", "failed", "cut")}
    for run in runs:
        if run.state.status == "failed":
            say(f"failed: {run.row.name}, seed {run.seed}: {run.state.error}; its log: {run.job.log}")
    for path in write_report(table, given.scale, runs) if counts["finished"] else []:
        say(str(path))
    if stopped:
        say("stopped; the same command resumes it")
    print(json.dumps({"table": table.name, "scale": given.scale, **counts, "folder": str(folder)}), flush=True)
    return 130 if stopped else 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
