"""Every command of the README runs, and its Python examples do: as written, in a folder of links to this checkout.

Only lengths are cut: the quickstart takes 3 of its steps, and goes on to 5.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
QUICK = "trainer.max_steps=3 trainer.val_every=3 trainer.checkpoint_every=3 trainer.log_every=1 data.val_sequences=8"
SHORT = {
    "make train": ["make", "train", f"ARGS={QUICK}"],
    "make test": ["make", "--dry-run", "test"],  # it is what runs this test
    'make resume ARGS="trainer.max_steps=400"': ["make", "resume", "ARGS=trainer.max_steps=5"],
    'make train ARGS="init_from=scmoe:exported/model.safetensors name=further"': [
        *("make", "train", f"ARGS=init_from=scmoe:exported/model.safetensors name=further {QUICK}"),
    ],
    "make train CONFIG=configs/quickstart_vision.yaml": [
        *("make", "train", "CONFIG=configs/quickstart_vision.yaml"),
        f"ARGS={QUICK}",
    ],
}
SAYS = {
    "make train": '"steps": 3',
    "make test": "-m pytest",
    'make resume ARGS="trainer.max_steps=400"': '"steps": 5',
    "make list": "configs/quickstart.yaml",
    ".venv/bin/python docs/examples/load_export.py exported/model.safetensors": "likeliest next token",
    'make train ARGS="init_from=scmoe:exported/model.safetensors name=further"': "runs/further/",
}

pytestmark = [pytest.mark.smoke, pytest.mark.dist]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("the README's commands want the environment that `make setup` makes")
    folder = tmp_path_factory.mktemp("checkout")
    for name in (
        "Makefile",
        "pyproject.toml",
        ".venv",
        "configs",
        "datamodules",
        "docs",
        "experiments",
        "scmoe",
        ".cache",
    ):
        (ROOT / ".cache").mkdir(exist_ok=True)  # prepared data may be shared
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command, folder):
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_quickstart_is_two_commands():
    assert COMMANDS[:2] == ["make train", "make test"]
    assert SHORT.keys() <= set(COMMANDS), "a shortened command has gone from the README"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, folder):
    """In the order of the README: resume and sample go on from the newest run."""
    out = run(SHORT.get(command, shlex.split(command)), folder)
    assert SAYS.get(command, "") in out
    assert out.strip(), "it says something"


def test_every_logged_metric_is_in_the_table(folder):
    """Those of the runs that the commands above have left."""
    files = list(folder.glob("runs/*/*/metrics.csv"))
    if not files:
        pytest.skip("no command of the README has been run beside this test")
    logged = {name for file in files for name in file.read_text().partition("\n")[0].split(",") if "/" in name}
    assert {"train/loss", "val/loss", "moe/load_max"} <= logged
    assert not [name for name in logged if f"`{name}`" not in README]


def test_the_examples_run(folder):
    """The README shows a part of each; that of the export is among the commands above."""
    load_export, expert_parallel = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert load_export in (ROOT / "docs/examples/load_export.py").read_text()
    script = ROOT / "docs/examples/expert_parallel.py"
    assert expert_parallel in script.read_text()
    run([sys.executable, str(script)], folder)
