"""This module runs commands, in their own process or in ranks, and reads what they leave."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments.engine.ranks import run_ranks
from scmoe.command_line import call
from tests.support.forked import python
from tests.support.sentences import sentences

ROOT = Path(__file__).parents[2]
SUMMARY = (
    "run_dir val_loss perplexity bits_per_byte unigram_bits_per_byte tokens_per_s model_tflops"
    " peak_host_gib steps steps_here params_total params_active ep_size world_size drop_share"
    " load_max_ratio step_load_max rank_load_max step_drop dead_experts skipped"
)
# dropping and noise depend on the number of ranks
EXACT = ("moe.capacity_factor=null", "moe.noisy=false")
CANARY = "0123456789abcdef" * 2 + "canary00"  # as long as a key
TRAIN = ("-m", "scmoe", "train")


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """Return what a verb gives to other programs: standard output, which is JSON alone."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def run_dir(self) -> Path:
        return ROOT / self.summary["run_dir"]


def environment(**variables: str) -> dict[str, str]:
    """Return the variables of this process without those of tests, launchers and a W&B account,
    and these."""
    private = ("WANDB_", "TORCHELASTIC_", "MASTER_", "PYTEST_", "SLURM_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    env = {k: v for k, v in os.environ.items() if not k.startswith(private) and k not in names}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}


def run(*arguments: str, **variables: str) -> Done:
    """Run Python with these arguments in the repository's root."""
    env = environment(**variables)
    if arguments[0] == "-m":
        return Done(*python(*arguments, cwd=ROOT, env=env, timeout_s=250))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=250
    )
    return Done(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start Python with these arguments in the repository's root, in a session of its own, which
    is killed at the end.

    Ctrl-C interrupts it; a job in the background would ignore it."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def command_in_ranks(verb: str, world_size: int, *arguments: str, **variables: str) -> Done:
    """Run a verb in ranks of run_ranks, which start in 0.1 s; return the output of rank 0.

    The ranks have torchrun's variables, so the command joins them and starts no process.
    """
    first, *others = run_ranks(command_here, world_size, verb, arguments, variables)
    assert all((done.code, done.out) == (first.code, "") for done in others), "only rank 0 prints"
    return first


train_in_ranks, resume_in_ranks = (partial(command_in_ranks, verb) for verb in ("train", "resume"))


def command_here(
    rank: int, world_size: int, verb: str, arguments: tuple[str, ...], variables: dict[str, str]
) -> Done:
    """Run a verb in this rank of run_ranks."""
    os.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(("WANDB_", "PYTEST_"))]:
        del os.environ[name]
    os.environ |= variables
    return called(verb, *arguments)


def called(verb: str, *arguments: str) -> Done:
    """Run a verb in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = call(verb, *arguments)
    return Done(code, out.getvalue(), err.getvalue())


def train_on_text(folder: Path, world_size: int, *overrides: str) -> Path:
    """Train configs/debug.yaml on a small text of made-up sentences; return the run's directory."""
    (folder / "text.txt").write_text("\n".join(sentences(700, seed) for seed in range(4)))
    text = (
        "data.name=text",
        f"data.path={folder}/text.txt",
        "data.vocab_size=300",
        f"data.cache_dir={folder}/cache",
    )
    words = (f"trainer.devices={world_size}", f"runs_dir={folder}", "name=text", *overrides)
    return train_in_ranks(world_size, "configs/debug.yaml", *text, *words).run_dir.resolve()


def undocumented(metrics: Path) -> list[str]:
    """Return the metrics of a metrics.csv that the table of docs/runs.md does not have."""
    page = (ROOT / "docs/runs.md").read_text()
    names = metrics.read_text().partition("\n")[0].split(",")
    return [name for name in names if "/" in name and f"`{name}`" not in page]


def rows_of(metrics: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv without empty cells; a metric's column is empty until it is
    first logged."""
    with metrics.open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def column(run_dir: Path, metric: str) -> dict[int, float]:
    """Return a metric of a run by step."""
    return {
        int(row["step"]): float(row[metric])
        for row in rows_of(run_dir / "metrics.csv")
        if metric in row
    }
