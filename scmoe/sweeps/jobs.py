"""One job of a study, and what is kept of it.

<study>/lock                  held by the process that runs the study and, by inheritance, by all
                              its trainings
        states/<job>.json     what is known of a job: whole or absent
        logs/<job>.log        what its training printed

Runs of equal `config_digest` have equal results. A table makes a run again if its config's digest
has changed; a sweep goes on only if its base config's is unchanged.
"""

import fcntl
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from scmoe.config.as_yaml import to_yaml
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.files import read_json, write_whole
from scmoe.runs.seen import CONFIG_DEFAULTS, flat

TRAIN = (sys.executable, "-m", "scmoe", "train")
LOG_TAIL = 4096  # bytes
# where a run is kept and how it is shown: nothing that changes a result
NOT_IN_DIGEST = (
    "name",
    "runs_dir",
    "logger.",
    "data.cache_dir",
    "trainer.progress",
    "trainer.max_memory_gib",
)


@dataclass
class State:
    """What is known of a job. `results` belong to the study: its summary, or a trial's values."""

    status: str = "waiting"  # or running | finished | failed | cut
    run_dir: str | None = None
    seconds: float = 0.0  # of all its sessions
    done: float = 0.0  # share of its steps
    error: str | None = None
    failures: int = 0  # how often it has failed
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        return self.status in ("finished", "failed")


@dataclass(eq=False)
class StudyJob:
    """One training of a study. arguments: of the command that starts it; the launcher's last word
    is `train`. again: extensions and callbacks that the resume command must name, because a kept
    configuration runs no code. is_own: whether a run directory belongs to this job, not to an
    earlier job of this name with another config. judge: reads the finished job's results, may call
    it failed, and may return a job that follows it at once.
    """

    name: str
    title: str
    study: Path
    home: Path | None  # the folder of its run directories; None: it trains nothing
    arguments: Sequence[str]
    launcher: Sequence[str] = TRAIN
    again: Sequence[str] = ()
    is_own: Callable[[Path], bool] = lambda run_dir: True
    judge: Callable[["StudyJob"], "StudyJob | None"] = lambda job: None
    state: State = field(default_factory=State)
    worked_s: float = 0.0  # in this session
    progress: float = 0.0  # of this session, as a share of the job
    # worked_s and progress at the first step in its log, if less than half was done by then
    begun_s: float = 0.0
    begun_progress: float = 0.0

    @property
    def log(self) -> Path:
        return self.study / "logs" / f"{self.name}.log"

    @property
    def state_file(self) -> Path:
        return self.study / "states" / f"{self.name}.json"

    def run_dirs(self) -> list[Path]:
        """Return the run directories of this job, the newest first."""
        if self.home is None:
            return []
        run_dirs = sorted((path.parent for path in self.home.glob("*/config.yaml")), reverse=True)
        return [run_dir for run_dir in run_dirs if self.is_own(run_dir)]

    def to_resume(self) -> Path | None:
        """Return the newest run directory that has a checkpoint."""
        return next(
            (run_dir for run_dir in self.run_dirs() if any(run_dir.glob("checkpoints/*.ckpt"))),
            None,
        )

    def command(self, run_dir: Path | None) -> list[str]:
        """Return the command that resumes a run; None: the one that begins the job."""
        if run_dir is None:
            return [*self.launcher, *self.arguments]
        return [*self.launcher[:-1], "resume", str(run_dir), *self.again]

    def read(self) -> State:
        """Set the state from its file. The caller holds the lock, so a job that was running has
        been interrupted."""
        self.state = State(**read_json(self.state_file))
        if self.state.status == "running":
            self.state.status = "cut"
        return self.state

    def advance(self, seconds: float) -> None:
        """Add this time, and note how far the log says that the training is."""
        before = self.state.done
        self.state.done = max(before, fraction(self.log))
        self.state.seconds += seconds
        self.worked_s += seconds
        self.progress += self.state.done - before
        if 0 < self.progress < 0.5 and not self.begun_progress:
            self.begun_s, self.begun_progress = self.worked_s, self.progress

    def fail(self, why: str) -> None:
        self.state.status, self.state.error = "failed", why
        self.state.failures += 1

    def keep(self) -> None:
        write_whole(self.state_file, asdict(self.state))


@contextmanager
def hold_lock(study: Path) -> Iterator[IO[str]]:
    """Hold the lock of a study. Raises ConfigError where another process holds it, and where its
    folder cannot be written."""
    try:
        study.mkdir(parents=True, exist_ok=True)
        (study / "lock").touch()
    except OSError as error:
        raise ConfigError(
            f"{study} cannot be written: {error.strerror}. Set another runs_dir"
        ) from error
    with (study / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{study}: another process is running this study; wait for it or stop it"
            ) from error
        yield lock


def config_digest(config: Config) -> str:
    """Return a hash of the values that can change a result. Defaults are left out: a new field
    changes no digest."""
    values = flat(to_yaml(config)).items()
    hashed = {
        key: value
        for key, value in values
        if value != CONFIG_DEFAULTS[key] and not key.startswith(NOT_IN_DIGEST)
    }
    return sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def fraction(log: Path) -> float:
    """Return how far a training is, by the last step in its log."""
    steps = re.findall(r"^step (\d+)/(\d+) ", _tail(log), re.MULTILINE)
    return min(1.0, int(steps[-1][0]) / int(steps[-1][1])) if steps else 0.0


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank."""
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    return lines[-1].removeprefix("[rank0]: ")[:200] if lines else "it printed nothing"


def clock(seconds: float) -> str:
    """Return a time such as 2 h 05 min, 5 min 03 s or 3 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _tail(log: Path) -> str:
    with suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        return file.read().decode(errors="replace")
    return ""
