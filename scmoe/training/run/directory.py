"""The directory of a run: its name, what is needed to run it again, and its state.

    runs/<experiment>/<stamp>-<slug>/
        config.yaml  config-from-<step>.yaml  overrides.txt  env.json  metrics.csv  summary.json
        plan.json  state.json  checkpoints/  wandb/  wandb_run.json  and more (docs/runs.md)
    runs/latest     a link to the newest run

Only rank 0 writes. A run whose config cannot be written does not start.
"""

import csv
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scmoe.config.installation import scmoe
from scmoe.config.leaves import ConfigError
from scmoe.files import read_json, redacted, replacing, try_to_write_json, warn_once
from scmoe.parallel.checkpoint.durable import machine, process_start
from scmoe.parallel.container_memory import GIB, machine_memory

# Keys that are not in a run's name.
UNNAMED_KEYS = re.compile(r"name|runs_dir|logger\..*|trainer\.progress|data\.cache_dir")
VALUE_CHARS = 24  # of one value in a run's name
SLUG_CHARS = 64  # of all; with the stamp, well below a file system's 255 bytes
CPUINFO = Path("/proc/cpuinfo")
STATE = "state.json"
STATES = ("running", "finished", "failed", "cut")
BEAT_S = 60.0
SILENT_S = 600.0  # above the difference of two machines' clocks, and a pause of a shared disk


def create_run_dir(root: Path, experiment: str, overrides: Sequence[str], config_yaml: str) -> Path:
    """Create the directory of a new run and write what is needed to run it again, without keys and
    passwords."""
    overrides = redacted(overrides)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    slug = slug_of(overrides)
    run_dir = root / experiment / f"{stamp}-{slug or uuid.uuid4().hex[:4]}"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    while not made(run_dir):
        run_dir = run_dir.with_name(f"{stamp}-{slug}-{uuid.uuid4().hex[:4]}")
    write_config(run_dir / "config.yaml", config_yaml)
    (run_dir / "overrides.txt").write_text(
        "".join(f"{o}\n" for o in overrides), "utf-8", "surrogateescape"
    )
    (run_dir / "env.json").write_text(json.dumps(environment(), indent=2), encoding="utf-8")
    point_latest(root, run_dir)
    return run_dir


def made(run_dir: Path) -> bool:
    """Make a directory, and return whether it is new: two runs may begin in the same second, and
    only one of them makes it."""
    try:
        run_dir.mkdir()
    except FileExistsError:
        return False
    return True


def slug_of(overrides: Sequence[str]) -> str:
    """Return what distinguishes the run: `ep_size-2-lr-1e-3` for strategy.ep_size=2 optim.lr=1e-3;
    "" for nothing.

    The number of steps comes last. A slug that is too long, or has characters that a file name
    should not have, shows a part and ends with a digest. So different overrides have different
    slugs.
    """
    pairs = dict(o.removeprefix("--").partition("=")[::2] for o in overrides)
    kept = [(key, value) for key, value in pairs.items() if not UNNAMED_KEYS.fullmatch(key)]
    kept.sort(key=lambda pair: pair[0] == "trainer.max_steps")
    complete = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in kept)
    short = "-".join(f"{key.rpartition('.')[2]}-{value[:VALUE_CHARS]}" for key, value in kept)
    slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", short)[:SLUG_CHARS].strip("-")
    if slug == complete:
        return slug
    digest = hashlib.sha256(repr(kept).encode()).hexdigest()
    return f"{slug}-{digest[:8]}"


def write_config(path: Path, config_yaml: str) -> None:
    """Write a configuration. OSError: it cannot be written; an earlier file is then unchanged."""
    with replacing(path) as partial:
        partial.write_text(config_yaml, encoding="utf-8")


def point_latest(root: Path, run_dir: Path) -> None:
    """Make runs/latest a link to run_dir, in one step: a reader always finds a run there.

    Where that is impossible, warn: the folder may be a copy, in which links became folders, or on a
    file system without links.
    """
    fresh = root / f".latest-{uuid.uuid4().hex[:8]}"
    try:
        fresh.symlink_to(run_dir.relative_to(root))  # not resolved: a folder of it may be a link
        os.replace(fresh, root / "latest")
    except OSError as error:
        fresh.unlink(missing_ok=True)
        warn_once(
            f"{root / 'latest'} cannot be made a link to this run: {error.strerror or error}. Use"
            f" {run_dir}, and remove {root / 'latest'} if it is a copy of another run"
        )


def environment() -> dict[str, Any]:
    """Return command line, versions, machine and code. Environment variables are left out: they
    hold keys."""
    packages = {}
    for name in ("scmoe", "torch", "lightning", "omegaconf", "wandb", "numpy", "tokenizers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": command_line(),
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(machine_memory() / GIB, 1),
        "packages": packages,
        "git_commit": git("rev-parse", "HEAD"),
        "git_diff": redacted(git("diff", "HEAD")),
    }


def command_line() -> str:
    """Return the command of this process as one can paste it into a shell, without keys and
    passwords."""
    program, *words = redacted(sys.argv)
    if Path(program).name == "scmoe" or program.endswith("scmoe/__main__.py"):
        return scmoe(*words)
    return shlex.join(redacted(sys.orig_argv))


def processor() -> str:
    """Return the name of the processor; on Linux that of its first core."""
    if not CPUINFO.exists():
        return platform.processor()
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.partition(":") for line in lines]
    names = [value.strip() for key, _, value in pairs if key.strip() == "model name"]
    return names[0] if names else platform.machine()  # ARM's cores have no name


def git(*command: str) -> str | None:
    """Return what git prints; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *command], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()  # the content of files may have any bytes


def why_no_checkpoint(run_dir: Path, which: str = "last") -> str:
    """Return a message for a folder without this checkpoint."""
    if not run_dir.exists():
        return (
            f"there is no folder {run_dir}. Give the directory of a run; {scmoe('runs')} lists"
            " them."
        )
    if (run_dir / "config.json").exists():
        return (
            f"{run_dir} is a Hugging Face folder, not a run. Load it in Python: scmoe.load(FOLDER)."
        )
    return (
        f"{run_dir} has no whole {which} checkpoint. Give the directory of a run that has saved"
        " one."
    )


def refuse_without_checkpoint(run_dir: Path, which: str = "last") -> None:
    """Raise ConfigError for a folder that cannot have this checkpoint. No file is read, so that a
    wrong name is refused before torch is imported."""
    if not any(run_dir.glob("checkpoints/*")):
        raise ConfigError(why_no_checkpoint(run_dir, which))


# The state of a run is running, finished, failed or cut. A killed process cannot write `cut`: it
# leaves `running` with its id and start time, which is read as `cut` once the process no longer
# exists. Another machine or container cannot see the process. So a training run touches its file,
# and there it counts as running until the file has not been touched for SILENT_S.


@contextmanager
def kept_state(run_dir: Path) -> Iterator[None]:
    """Keep the state of the run that this process makes: running while the block runs, then
    `finished`, `cut` where the Strategy was asked to stop and has saved (SystemExit), else
    `failed`."""
    ended = show_life(run_dir)
    state = "failed"
    write_state(run_dir, "running")
    try:
        yield
        state = "finished"
    except SystemExit:
        state = "cut"
        raise
    finally:
        ended.set()
        write_state(run_dir, state)


def write_state(run_dir: Path, state: str) -> None:
    """Write the state of the run that this process makes."""
    process = {
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "host": platform.node(),
        "machine": machine(),
    }
    try_to_write_json(run_dir / STATE, {"state": state, **process})


def show_life(run_dir: Path) -> threading.Event:
    """Touch the state's file every BEAT_S, until the event that this returns is set."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            with suppress(OSError):
                os.utime(run_dir / STATE)

    threading.Thread(target=beat, name="show-life", daemon=True).start()
    return ended


def read_state(run_dir: Path) -> str:
    """Return running, finished, failed or cut. A run without a whole state.json, or with one of
    another form, is finished if it has a summary."""
    kept = _kept_state(run_dir)
    if not kept:
        return "finished" if (run_dir / "summary.json").exists() else "cut"
    if kept["state"] == "running" and not _lives(kept, run_dir / STATE):
        return "cut"
    return kept["state"]


def _kept_state(run_dir: Path) -> dict[str, Any]:
    """Return what `write_state` has written; {} where the file is missing, not whole or of another
    form."""
    kept = read_json(run_dir / STATE)
    process = (kept.get("pid"), kept.get("host"), kept.get("started", 0))
    types = (int, str, str | None)
    is_ours = kept.get("state") in STATES and all(map(isinstance, process, types))
    return kept if is_ours else {}


def refuse_running(run_dir: Path) -> None:
    """Raise ConfigError if another process is training this run: two would write the same files."""
    if read_state(run_dir) != "running":
        return
    path = run_dir / STATE
    kept = _kept_state(run_dir)
    if kept.get("machine") != machine():
        raise ConfigError(
            f"Process {kept['pid']} on {kept['host']}, perhaps in a container, is training"
            f" {run_dir}. Stop it first. If it was killed, wait {SILENT_S / 60:g} minutes from then"
            f" on, or delete {path}."
        )
    if kept["pid"] != os.getpid() and kept["started"] is not None:
        raise ConfigError(f"Process {kept['pid']} is training {run_dir}. Stop it first.")


def _lives(kept: dict[str, Any], path: Path) -> bool:
    """Return whether the process of a state file exists, or, on another machine, whether the file
    was touched lately."""
    if kept.get("machine") == machine():
        return process_start(kept["pid"]) == kept["started"]
    return time.time() - path.stat().st_mtime <= SILENT_S


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """Return the whole rows of metrics.csv; none if there is no file. A crash may leave half a
    row."""
    path = run_dir / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]
