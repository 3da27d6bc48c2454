"""One table from beginning to end: its trainings, evaluations and speeds, then its files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load
from scmoe.experiments.bench.pairs import ROWS
from scmoe.experiments.studies.checks import refusal
from scmoe.experiments.studies.job import Job, State, lock_of
from scmoe.experiments.studies.table.copies import adopt, save
from scmoe.experiments.studies.table.evaluations import Evaluations
from scmoe.experiments.studies.table.launch import check_memory, write_launch_files
from scmoe.experiments.studies.table.rows import Scale, Table, check_scale
from scmoe.experiments.studies.table.speeds import measure_speeds
from scmoe.experiments.studies.table.table_report import write_report
from scmoe.experiments.studies.table.table_runs import Run, plan_runs, read_states
from scmoe.experiments.studies.table.trainings import make_runs
from scmoe.training.assembly.data import build_datamodule


@dataclass(frozen=True)
class Request:
    """What a table is asked to do. jobs, seeds: None: those of the scale. sources: folders with states of equal runs.
    to: the folder that results and states are copied into."""

    scale: str
    overrides: Sequence[str] = ()
    jobs: int | None = None
    seeds: int | None = None
    sources: Sequence[Path] = ()
    to: Path | None = None


@dataclass(frozen=True)
class Commands:
    """here: runs a verb in this process, as of Batch, for jobs=0. say: prints a line."""

    here: Callable[..., int]
    say: Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """A table at a scale, with all its runs; nothing is started yet."""

    table: Table
    scale_name: str
    scale: Scale
    jobs: int | None
    runs: list[Run]
    command: str  # the make command of this table, without runs_dir, --from and --to

    @property
    def folder(self) -> Path:
        return self.runs[0].job.study


@dataclass
class Made:
    """The outcome of a table. failed: trainings, evaluations and measurements. signal: that stopped it, or 0."""

    plan: Plan
    finished: int = 0
    failed: int = 0
    cut: int = 0
    signal: int = 0
    rows: int = 0  # with at least one finished run
    files: list[Path] = field(default_factory=list)


def plan_table(table: Table, request: Request, say: Callable[[str], None]) -> Plan:
    """Return the plan of a request. Raises ConfigError, in one line, for what cannot be honoured."""
    name = request.scale
    check_scale(table, name)
    scale = table.scales[name]
    for row in table.rows:
        if row.speed is not None and row.speed not in ROWS:
            raise refusal(f"{table.name}: speed of {row.name!r}", row.speed, " | ".join(ROWS))
    if scale.otherwise is not None and (missing := _missing_data(scale, request.overrides)):
        say(f"{table.name} runs at scale {scale.otherwise}, not {name}: {missing}")
        name, scale = scale.otherwise, table.scales[scale.otherwise]
    jobs = scale.jobs if request.jobs is None else request.jobs
    seeds = scale.seeds if request.seeds is None else request.seeds
    if seeds < 1 or (jobs or 0) < 0:
        raise ConfigError(f"--seeds is {seeds}, --jobs is {jobs}, allowed: 1 or more, 0 or more")
    folder = Path(load(scale.config, request.overrides).runs_dir) / "tables" / f"{table.name}-{name}"
    if request.to is not None and (request.to / folder.name).resolve() == folder.resolve():
        raise refusal("--to", str(request.to), "a folder other than that of the tables, such as docs/results")
    runs = plan_runs(table, scale, folder, seeds, request.overrides)
    trainer = runs[0].config.trainer
    if jobs is None and request.to is not None:
        raise refusal("--to", str(request.to), "at a scale whose runs are made here")
    if jobs is None and trainer.num_nodes > 1:
        raise ConfigError(f"trainer.num_nodes is {trainer.num_nodes}, allowed in launch files: 1")
    if jobs == 0 and trainer.devices * trainer.num_nodes > 1:  # Lightning's launcher would start this command again
        raise ConfigError("--jobs is 0, allowed for runs of several ranks: 1 or more, as each needs its own processes")
    words = [] if seeds == scale.seeds else [f"--seeds {seeds}"]
    words += [word for word in request.overrides if not word.removeprefix("--").startswith("runs_dir=")]
    arguments = f' ARGS="{" ".join(words)}"' if words else ""
    return Plan(table, name, scale, jobs, runs, f"make table TABLE={table.name} SCALE={name}{arguments}")


def make_table(plan: Plan, request: Request, commands: Commands) -> Made:
    """Do what is left of a table and write its files. The same call resumes one that was stopped."""
    table, runs, made = plan.table, plan.runs, Made(plan)
    if plan.jobs is None:
        commands.say(f"{plan.scale_name} is not run here; start it elsewhere with one of:")
        for command in write_launch_files(runs):
            commands.say(f"  {command}")
        for line, fits in check_memory(table, runs, plan.scale.gpu_gib):
            commands.say(line)
            made.failed += not fits
        made.rows = len(table.rows)
        return made
    needed = list(dict.fromkeys(["val_loss", *(key for m in table.metrics_from("summary") for key in m.keys)]))
    evaluations = Evaluations(table, plan.scale)
    speeds: list[Job] = []
    with lock_of(plan.folder) as lock:
        read_states(runs)
        lost = [run for run in runs if run.state.status == "finished" and not evaluations.can_use(run.state)]
        for run in lost:
            run.job.state = State()
        if found := adopt(runs, request.sources, evaluations):
            commands.say(f"{found} of {len(runs)} runs are taken from runs of equal configuration")
        if again := sum(run.state.status == "waiting" for run in lost):
            commands.say(f"{again} finished runs are trained again: an evaluation is missing, and so are their weights")
        made.signal = make_runs(runs, lock, plan.jobs, needed, evaluations, commands.here)
        if not made.signal:
            speeds, made.signal = measure_speeds(table, plan.scale, plan.folder, lock)
    jobs = [*(run.job for run in runs), *evaluations.of, *speeds]
    for job in jobs:
        if job.state.status == "failed":
            commands.say(f"failed: {job.title}: {job.state.error}; its log: {job.log}")
    made.finished = sum(run.state.status == "finished" for run in runs)
    made.failed = sum(job.state.status == "failed" for job in jobs)
    made.cut = sum(job.state.status == "cut" for job in jobs)
    made.rows = len({run.row.name for run in runs if run.state.status == "finished"})
    if files := _of_other_data(runs):
        made.failed += 1
        commands.say(f"failed: the report, as runs have read different data; remove {' '.join(map(str, files))}")
    elif made.finished:
        made.files = write_report(table, plan.scale_name, runs, plan.command)
        if request.to is not None:
            made.files.append(save(runs, request.to))
    return made


def _of_other_data(runs: Sequence[Run]) -> list[Path]:
    """Return the state files of runs that have read other data than the newest one. Earlier versions noted no data."""
    noted = [run for run in runs if run.state.status == "finished" and run.state.results.get("data")]
    newest = max(noted, key=lambda run: run.job.state_file.stat().st_mtime, default=None)
    return [run.job.state_file for run in noted if newest and run.state.results["data"] != newest.state.results["data"]]


def _missing_data(scale: Scale, overrides: Sequence[str]) -> str | None:
    """Return why the scale's data set is not on this machine, or None."""
    config = load(scale.config, overrides)
    try:
        build_datamodule(config)
    except ConfigError as error:
        return str(error)
    return None
