"""The plan of a table at a scale: all its runs, before any of them is started."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote

from experiments.bench.pairs import ROWS
from experiments.tables.table_file import PaperTable, Scale, TableOptions
from experiments.tables.table_runs import Run, plan_runs, refuse_to_overwrite
from experiments.tables.table_speeds import parse_every
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.report import say
from scmoe.sweeps.checks import refusal
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.run.machine import why_not_writable


@dataclass(frozen=True)
class TablePlan:
    """A table at a scale, with all its runs; nothing is started yet. overrides: of all runs."""

    table: PaperTable
    scale_name: str
    options: TableOptions
    overrides: Sequence[str]
    runs: list[Run]

    @property
    def scale(self) -> Scale:
        return self.table.scales[self.scale_name]

    @property
    def jobs(self) -> int:
        """Return the number of runs in parallel; 0: all in this process."""
        return self.scale.jobs if self.options.jobs is None else self.options.jobs

    @property
    def folder(self) -> Path:
        return self.runs[0].job.study

    @property
    def command(self) -> str:
        """Return the make command of this table, without runs_dir and --to."""
        seeds = len(self.runs) // len(self.table.rows)
        words = [
            word for word in self.overrides if not word.removeprefix("--").startswith("runs_dir=")
        ]
        if seeds != self.scale.seeds:
            words = ["--seeds", str(seeds), *words]
        command = f"make table TABLE={self.table.name} SCALE={self.scale_name}"
        # the shell that make starts reads the words, after make has read $
        return f"{command} ARGS={quote(join(words).replace('$', '$$'))}" if words else command


def plan_table(table: PaperTable, options: TableOptions, overrides: Sequence[str]) -> TablePlan:
    """Return the plan of a table at a scale that it has. ConfigError: something cannot be honoured.

    Where the scale's data set is not on this machine, the plan is that of another scale, if the
    table names one.
    """
    check_speeds(table)
    name = scale_with_data(table, options.scale, overrides)
    scale = table.scales[name]
    seeds = scale.seeds if options.seeds is None else options.seeds
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}. A table needs 1 or more")
    if (options.jobs or 0) < 0:
        raise ConfigError(f"--jobs is {options.jobs}. Give 0 for one process, or 1 or more")
    config = load_config(scale.config, overrides)
    if config.trainer.fast_dev_run:
        raise ConfigError(
            "trainer.fast_dev_run is true, but a table compares whole trainings. Leave it out;"
            " --scale smoke is the short trial of a table"
        )
    folder = Path(config.runs_dir) / "tables" / f"{table.name}-{name}"
    if options.to is not None and (options.to / folder.name).resolve() == folder.resolve():
        raise ConfigError(
            f"--to is {options.to}, where the table itself is made. Give another folder, such as"
            " docs/results"
        )
    plan = TablePlan(
        table, name, options, overrides, plan_runs(table, scale, folder, seeds, overrides)
    )
    if options.to is not None:
        if (why := why_not_writable(options.to / folder.name)) is not None:
            raise ConfigError(f"--to cannot be written: {why}. Give another folder")
        refuse_to_overwrite(plan.runs, options.to)
    trainer = plan.runs[0].config.trainer
    ranks = trainer.devices * trainer.num_nodes
    if plan.jobs == 0 and ranks > 1:  # Lightning would start this command again
        raise ConfigError(
            f"--jobs is 0, but a run has {ranks} ranks, which need processes of their own. Set"
            " --jobs to 1 or more"
        )
    return plan


def check_speeds(table: PaperTable) -> None:
    """Raise ConfigError for a row whose speed the testbed cannot measure, at any scale."""
    for scale in table.scales.values():
        known = ROWS[2] | ROWS[1] if scale.bench is None else ROWS[parse_every(scale.bench)]
        for row in table.rows:
            if row.speed is not None and row.speed not in known:
                raise refusal(f"{table.name}: speed of {row.name!r}", row.speed, " | ".join(known))


def scale_with_data(table: PaperTable, scale_name: str, overrides: Sequence[str]) -> str:
    """Return the name of the scale, or of the one that is run where its data set is missing."""
    scale = table.scales[scale_name]
    config = load_config(scale.config, overrides)
    if scale.otherwise is None:
        return scale_name
    try:
        build_datamodule(config)
    except ConfigError as missing:
        say(f"{table.name} runs at scale {scale.otherwise}, not {scale_name}: {missing}")
        return scale.otherwise
    return scale_name
