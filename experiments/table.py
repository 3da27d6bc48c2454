"""`scmoe table` runs a table of the paper."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Parameter

from scmoe.experiments.engine.command_line import OneEach, call

if TYPE_CHECKING:
    from scmoe.experiments.studies.table.make import Commands, Request


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """The options that `table` and `reproduce` share.

    Args:
        scale: one of table.yaml: smoke | small | digits | paper
        jobs: number of runs in parallel; 0: all in this process
        seeds: seeds 1 to this
        from_: take the results of runs of equal configuration from this folder, such as docs/results; may be repeated
        to: copy results and states of finished runs into this folder, after taking those that it has
    """

    scale: str = "smoke"
    jobs: int | None = None
    seeds: int | None = None
    from_: OneEach[Path] = ()
    to: Path | None = None

    def request(self, overrides: tuple[str, ...]) -> "Request":
        from scmoe.config.extras import require
        from scmoe.config.leaves import ConfigError
        from scmoe.config.load import load

        require("a table", "matplotlib", "scipy")
        from scmoe.experiments.studies.table.make import Request

        runs_dir = load(None, [word for word in overrides if word.removeprefix("--").startswith("runs_dir=")]).runs_dir
        for folder in self.from_:
            if not any(folder.glob("*/states/*.json")):
                allowed = "a folder of tables that has <table>-<scale>/states/, such as docs/results"
                raise ConfigError(f"--from is {str(folder)!r}, allowed: {allowed}")
        # tables have rows in common, and what is in `to` will be replaced
        sources = [Path(runs_dir) / "tables", *self.from_, *([self.to] if self.to else [])]
        return Request(self.scale, overrides, self.jobs, self.seeds, sources, self.to)


USUAL = Options()


def commands() -> "Commands":
    from scmoe.experiments.studies.table.make import Commands
    from scmoe.runs.seen import console

    screen = console(stderr=True)
    return Commands(call, lambda line: screen.print(line, soft_wrap=True, markup=False))


def main(table: str, /, *overrides: str, options: Options = USUAL) -> int:
    """Run a table of the paper and set our values beside the paper's.

    Finished runs are skipped and interrupted ones are resumed; Ctrl-C stops with a checkpoint of each. The files are in
    <runs_dir>/tables/<table>-<scale>; standard output is a summary as JSON.
    Exit codes: 1, a run failed; 2, the request was wrong; 130, stopped.

    Args:
        table: a folder of configs/experiment with a table.yaml, such as table3
        overrides: key=value, for every run
    """
    from scmoe.experiments.studies.table.rows import check_scale, load_table

    rows = load_table(table)
    check_scale(rows, options.scale)
    request = options.request(overrides)
    from scmoe.experiments.studies.table.make import make_table, plan_table

    here = commands()
    plan = plan_table(rows, request, here.say)
    seeds = len(plan.runs) // len(plan.table.rows)
    here.say(f"{plan.table.title}: {len(plan.table.rows)} rows x {seeds} seeds, in {plan.folder}")
    made = make_table(plan, request, here)
    for path in made.files:
        here.say(str(path))
    if made.signal:
        here.say("stopped; the same command resumes it")
    counts = {"finished": made.finished, "failed": made.failed, "cut": made.cut}
    last = {"table": plan.table.name, "scale": plan.scale_name, **counts, "folder": str(plan.folder)}
    print(json.dumps(last), flush=True)
    return 130 if made.signal else 1 if made.failed else 0


if __name__ == "__main__":
    sys.exit(call("table", *sys.argv[1:]))
