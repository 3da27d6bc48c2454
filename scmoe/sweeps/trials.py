"""Runs the trials of a sweep. Each is an ordinary training; they run one after the other on this
machine, or W&B proposes them.

<runs_dir>/sweeps/<sweep>/   sweep.json             the sweep as it was begun
                             trial-003/<stamp>-.../ run directories
                             lock  states/  logs/   scmoe/sweeps/jobs.py
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from scmoe.config import registry
from scmoe.config.leaves import ConfigError
from scmoe.config.untyped import as_word
from scmoe.files import write_whole
from scmoe.report import say
from scmoe.runs.seen import SeenRun
from scmoe.sweeps.batch import BatchProgress, JobBatch
from scmoe.sweeps.jobs import State, StudyJob, config_digest, hold_lock
from scmoe.sweeps.search import Trial, best, propose, total
from scmoe.sweeps.sweep_file import Sweep, words


def run_trials(sweep: Sweep) -> tuple[list[Trial], int]:
    """Resume the interrupted trial, then run new ones until the search proposes no more.

    Return all trials, and the signal that stopped them, or 0. Raises ConfigError where another
    process runs this sweep, where the sweep is not as it was begun, and where a trial has not
    logged the sweep's metric.
    """

    def next_job() -> StudyJob | None:
        trials = [trial_of(job) for job in jobs]
        if trials and trials[-1].state == "finished" and not trials[-1].history:
            rows, number = SeenRun(Path(trials[-1].run_dir)).metrics, trials[-1].number
            known = ", ".join(dict.fromkeys(name for row in rows for name in row if "/" in name))
            raise ConfigError(
                f"metric.name is {sweep.metric!r}, which trial {number} has not logged. It has"
                f" logged {known}"
            )
        if (proposed := propose(sweep, trials)) is None:
            return None
        results = {
            key: vars(proposed)[key]
            for key in ("number", "point", "parameters", "history", "steps")
        }
        jobs.append(_job(sweep, State(results=results)))
        return jobs[-1]

    def look(job: StudyJob) -> None:
        job.state.results |= _logged(sweep, job)

    def result(job: StudyJob) -> str:
        value = trial_of(job).value
        return "" if value is None else f"{sweep.metric} {value:.4f}"

    def best_so_far() -> str:
        first = best(sweep, [trial_of(job) for job in jobs])
        return f"best {first.value:.4g}" if first and first.value is not None else ""

    watch = BatchProgress(result, best_so_far)
    with hold_lock(sweep.folder) as lock, watch.bar:
        jobs = _begun(sweep)
        if ended := sum(job.state.has_ended for job in jobs):
            watch.say(f"{ended} trials have ended already")
        batch = JobBatch(jobs, 1, total(sweep), watch, propose=next_job, look=look)
        signum = batch.run(lock)
        return [trial_of(job) for job in jobs], signum


def trial_of(job: StudyJob) -> Trial:
    """Return a job as the search sees it."""
    state = job.state
    facts: dict[str, Any] = {
        "seconds": state.seconds,
        "run_dir": state.run_dir or "",
        "reason": state.error or "",
    }
    return Trial(**state.results, state=state.status, **facts)


def _job(sweep: Sweep, state: State) -> StudyJob:
    """Return the job of a trial. state: its results hold the trial as the search proposed it."""
    number = state.results["number"]
    parameters = words(state.results["parameters"])
    name = f"trial-{number:03}"
    folder = as_word(str(sweep.folder))
    last_words = [f"name={name}", f"runs_dir={folder}", f"logger.group={sweep.name}"]
    for key in ("project", "entity"):
        if name_at_wandb := sweep.raw.get(key):
            last_words.append(f"logger.{key}={name_at_wandb}")
    base = sweep.base
    options = [word for word in parameters if word.startswith("callbacks.")]

    def judge(job: StudyJob) -> None:
        trial = trial_of(job)
        if trial.history and trial.value is None:
            job.fail(f"its last {sweep.metric} is {trial.history[-1]}")

    most = total(sweep)
    return StudyJob(
        name,
        f"trial {number} of {most}" if most else f"trial {number}",
        sweep.folder,
        sweep.folder / name,
        [sweep.config, *parameters, *sweep.overrides, *last_words],
        again=[*registry.words(base.extensions, base.callbacks), *options],
        judge=judge,
        state=state,
    )


def _begun(sweep: Sweep) -> list[StudyJob]:
    """Return the trials of earlier calls. Raises ConfigError if they were another sweep's; run_cap
    may change."""
    path = sweep.folder / "sweep.json"
    same = {
        key: value
        for key, value in sweep.raw.items()
        if key not in ("run_cap", "name", "description")
    }
    digest = {sweep.config: config_digest(sweep.base)}
    settings: dict[str, Any] = json.loads(json.dumps(same)) | digest
    begun_with = settings
    if path.exists():
        begun_with = digest | json.loads(path.read_text(encoding="utf-8"))
    keys = {**begun_with, **settings}
    if changed := [key for key in keys if begun_with.get(key) != settings.get(key)]:
        raise ConfigError(
            f"{', '.join(changed)} is not as it was when {sweep.folder} was begun. Restore the"
            " file, give the sweep another name, or remove that folder"
        )
    write_whole(path, settings)
    states = [
        State(**json.loads(kept.read_text(encoding="utf-8")))
        for kept in (sweep.folder / "states").glob("trial-*.json")
    ]
    states.sort(key=lambda state: state.results["number"])
    jobs = [_job(sweep, state) for state in states]
    for job in jobs:
        job.read()
    return jobs


def _logged(sweep: Sweep, job: StudyJob) -> dict[str, Any]:
    """Return the metric's history and the steps of the trial's newest run; {} before it has logged
    anything."""
    run = next((SeenRun(run_dir) for run_dir in job.run_dirs()), None)
    if run is None or not run.metrics:
        return {}
    rows = run.metrics
    history = [row[sweep.metric] for row in rows if sweep.metric in row]
    steps = max((int(row["step"]) + 1 for row in rows if "step" in row), default=0)
    # the last validation is logged after the last step
    return {"history": history, "steps": min(steps, run.max_steps)}


def run_online(sweep: Sweep) -> tuple[str, int]:
    """Create the sweep at W&B and run an agent, which takes trials until the server has no more.

    Print the commands that create such a sweep, join it and resume it. Return the sweep's path at
    W&B and an exit code. Raises ConfigError where W&B does not take the sweep.
    """
    import wandb

    from scmoe.training.run.wandb_logger import wandb_mode, wandb_project

    if (mode := wandb_mode(sweep.base)) not in ("auto", "online"):
        key = "WANDB_MODE" if sweep.base.logger.mode == "auto" else "logger.mode"
        raise ConfigError(
            f"{key} is {mode!r}, so W&B would see no trial. Set auto or online, or add --local"
        )
    project = sweep.raw.get("project") or wandb_project(sweep.base)
    try:
        entity = sweep.raw.get("entity") or sweep.base.logger.entity or wandb.Api().default_entity
        with redirect_stdout(sys.stderr):
            sweep_path = f"{entity}/{project}/{wandb.sweep(sweep.raw, entity, project)}"
    # ValueError: the answer is none that wandb can read
    except (wandb.Error, OSError, ValueError) as error:
        raise ConfigError(
            f"Weights & Biases takes no sweep: {error}. Add --local to run it here"
        ) from error
    sweep.folder.mkdir(parents=True, exist_ok=True)
    file = sweep.folder / "sweep.yaml"
    join = f"PATH=$PWD/.venv/bin:$PATH wandb agent {sweep_path}"
    file.write_text(yaml.safe_dump(sweep.raw, sort_keys=False), encoding="utf-8")
    say(
        f"the sweep was created at W&B, as by:\n    wandb sweep --entity {entity} --project"
        f" {project} {file}"
    )
    say(f"agents may join from other machines, each in its copy of this folder, with:\n    {join}")
    agent = [sys.executable, "-m", "wandb", "agent", "--forward-signals", sweep_path]
    # The agent calls `python`, which must be this interpreter, and keeps its notes in the sweep's
    # folder.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    settings = {**os.environ, "PATH": path, "WANDB_DIR": str(sweep.folder.absolute())}
    # 2: standard error, for summaries of trials
    process = subprocess.Popen(agent, env=settings, stdout=2, start_new_session=True)
    stopped: list[int] = []

    def stop(signum: int, _: Any) -> None:
        stopped.append(signum)
        # the agent sends it to its trial, which saves; at a second signal it waits no longer
        process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = process.wait()
    if stopped:
        code = 128 + stopped[0]
        say(f"go on        {join}")
    return sweep_path, code
