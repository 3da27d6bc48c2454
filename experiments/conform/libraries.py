"""Asks other libraries, each in an environment of its own with pinned versions, and keeps the
answers in docs/results/conform/.

    python -m experiments.conform.libraries FOLDER [NAME ...]

FOLDER: where environments are made, outside of this checkout; one that is there already is used as
it is. NAME: a key of LIBRARIES; all by default.
"""

import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from scmoe.config.installation import CHECKOUT
from scmoe.report import say, write_json

ANSWERS_FOLDER = CHECKOUT / "docs/results/conform"
TORCH = "torch==2.13.0"
BUILD = ("setuptools", "wheel", "numpy", "ninja")  # DeepSpeed has no wheel
ACCELERATE = "accelerate==1.15.0"
TENSOR_PARALLEL = "experiments/conform/transformers_tp.py"
EXAMPLE_LAYERS = "docs/examples/conform"
SLOWEST_S = 1800.0  # of one library


@dataclass(frozen=True)
class Library:
    """packages: pinned; none: this Python. layer: as of `scmoe conform`. title: of its column."""

    title: str
    layer: str
    packages: tuple[str, ...] = ()
    dtype: str = "float32"


LIBRARIES = {
    "own": Library("scmoe, plain torch", f"{EXAMPLE_LAYERS}/own.py:make", dtype="float64"),
    "own-replicated": Library(
        "scmoe, Strategy, replicated", f"{EXAMPLE_LAYERS}/strategy.py:replicated", dtype="float64"
    ),
    "own-sharded": Library(
        "scmoe, Strategy, sharded", f"{EXAMPLE_LAYERS}/strategy.py:sharded", dtype="float64"
    ),
    "transformers-5.16.0-batched": Library(
        "transformers 5.16.0, batched_mm",
        f"{TENSOR_PARALLEL}:batched_mm",
        ("transformers==5.16.0", ACCELERATE),
    ),
    "transformers-5.16.0-grouped": Library(
        "transformers 5.16.0, grouped_mm",
        f"{TENSOR_PARALLEL}:grouped_mm",
        ("transformers==5.16.0", ACCELERATE),
    ),
    "transformers-5.17.0-batched": Library(
        "transformers 5.17.0, batched_mm",
        f"{TENSOR_PARALLEL}:batched_mm",
        ("transformers==5.17.0", ACCELERATE),
    ),
    "transformers-5.17.0-grouped": Library(
        "transformers 5.17.0, grouped_mm",
        f"{TENSOR_PARALLEL}:grouped_mm",
        ("transformers==5.17.0", ACCELERATE),
    ),
    "transformers-5.24.0": Library(
        "transformers 5.24.0, all_to_all", "hf:all_to_all", ("transformers==5.24.0", ACCELERATE)
    ),
    "transformers-5.24.0-shared": Library(
        "transformers 5.24.0, all_reduce", "hf:all_reduce", ("transformers==5.24.0", ACCELERATE)
    ),
    "deepspeed-0.19.8": Library(
        "DeepSpeed 0.19.8", "experiments/conform/deepspeed_moe.py:make", ("deepspeed==0.19.8",)
    ),
    "st-moe-pytorch-0.1.8": Library(
        "st-moe-pytorch 0.1.8", "experiments/conform/st_moe.py:make", ("st-moe-pytorch==0.1.8",)
    ),
}


def python_of(library: Library, folder: Path) -> str:
    """Return the Python of the library's environment, which is made if it is not there."""
    if not library.packages:
        return sys.executable
    environment = folder / library.packages[0].replace("==", "-")
    python = environment / "bin/python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", TORCH]
        subprocess.run([*install, *BUILD], check=True)
        packages = ["--no-build-isolation", "--editable", str(CHECKOUT), *library.packages]
        subprocess.run([*install, *packages], check=True)
    return str(python)


def ask(library: Library, python: str) -> dict[str, object]:
    """Return what `scmoe conform` answers, without the scripts that show a failure."""
    command = [python, "-m", "scmoe", "conform", library.layer, "--dtype", library.dtype]
    done = subprocess.run(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, timeout=SLOWEST_S
    )
    report = json.loads(done.stdout.splitlines()[-1])
    del report["reproducers"]
    day = datetime.now(UTC).date().isoformat()
    return {"title": library.title, "packages": [TORCH, *library.packages], "date": day} | report


def main(folder: str, *names: str) -> None:
    for name in names or LIBRARIES:
        library = LIBRARIES[name]
        say(f"{library.title}")
        write_json(ANSWERS_FOLDER / f"{name}.json", ask(library, python_of(library, Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
