"""Run a table of the paper and lay ours beside it: `python -m experiments.table TABLE --scale SCALE [key=value ...]`.

Overrides go to every run. Finished runs are skipped and cut ones go on; Ctrl-C stops with a checkpoint of each. What
comes out is in <runs_dir>/tables/<table>-<scale>; the last line on standard output is a summary as JSON.
Exit code 1: a run failed; 2: the request was wrong; 130: stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.status import Status

from experiments.harness import Session, clock, run_all
from experiments.table_config import Table, load_table
from experiments.table_launch import write_launch_files
from experiments.table_report import write_report
from experiments.table_runs import Run, plan, state_of
from scmoe.config.fields import ConfigError
from scmoe.config.load import load

SAY_EVERY_S = 60.0  # how far it is, where no terminal shows it


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="table", description=__doc__.split("\n")[0])
    parser.add_argument("table", help="a folder of configs/experiment with a table.yaml, such as table3")
    parser.add_argument("--scale", default="smoke", help="smoke | small | paper, as in table.yaml")
    parser.add_argument("--jobs", type=int, help="runs beside each other; 0: all in this process")
    parser.add_argument("--seeds", type=int, help="seeds 1 to this")
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    options = parser.parse_intermixed_args(arguments)
    try:
        return run_table(options.table, options.scale, options.jobs, options.seeds, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_table(name: str, scale_name: str, jobs: int | None, seeds: int | None, overrides: list[str]) -> int:
    table = load_table(name)
    if scale_name not in table.scales:
        raise ConfigError(f"--scale is {scale_name!r}, allowed: {', '.join(table.scales)}")
    scale = table.scales[scale_name]
    jobs, seeds = scale.jobs if jobs is None else jobs, scale.seeds if seeds is None else seeds
    if seeds < 1 or (jobs or 0) < 0:
        raise ConfigError(f"--seeds is {seeds}, --jobs is {jobs}, allowed: 1 or more, 0 or more")
    folder = Path(load(scale.config, overrides).runs_dir) / "tables" / f"{name}-{scale_name}"
    runs = plan(table, scale, folder, seeds, overrides)
    if jobs is None:
        files = write_launch_files(runs, folder)
        print(f"{scale_name} is not run here; launch it elsewhere with one of:", *files, sep="\n  ")
        return 0
    console = Console(highlight=False)
    console.print(f"{table.title}: {len(table.rows)} rows x {seeds} seeds, in {folder}", soft_wrap=True)
    with Progress(console) as progress:
        went_through = run_all(runs, jobs, table.metric, progress.say, progress.watch)
    return report(table, scale_name, runs, console, went_through)


def report(table: Table, scale_name: str, runs: list[Run], console: Console, went_through: bool) -> int:
    states = {run: state_of(run) for run in runs}
    counts = {status: sum(s.status == status for s in states.values()) for status in ("finished", "failed", "cut")}
    files = write_report(table, scale_name, states) if counts["finished"] else []
    for run, state in states.items():
        if state.status == "failed":
            console.print(f"failed: {run.title}: {state.error}; its log: {run.log}", soft_wrap=True, markup=False)
    for path in files:
        console.print(str(path), soft_wrap=True, markup=False)
    if not went_through:
        console.print("stopped; the same command goes on")
    print(json.dumps({"table": table.name, "scale": scale_name, **counts, "folder": str(runs[0].folder)}), flush=True)
    return 130 if not went_through else 1 if counts["failed"] else 0


class Progress:
    """A line that moves on a terminal, a line a minute elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status: Status | None = Status("starting", console=console) if console.is_terminal else None
        self.said = time.monotonic()

    def __enter__(self) -> Progress:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def watch(self, session: Session) -> None:
        if not session.left:
            return
        done, seconds = len(session.runs) - sum(session.left.values()), session.seconds_left()
        line = f"{done:.1f} of {len(session.runs)} runs done, " + (f"{clock(seconds)} left" if seconds else "starting")
        if self.status:
            self.status.update(line)
        elif time.monotonic() - self.said > SAY_EVERY_S:
            self.say(line)
            self.said = time.monotonic()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
