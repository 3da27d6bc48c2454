"""The commands of the README and of the pages run; so do their Python examples.

They run in a folder of links to this checkout, at a small size: the quickstart takes 3 steps of a
smaller model and is resumed to 5. A page's commands use what earlier ones have left: the README's
`make train` leaves the newest run. `make test` runs one command of each kind that is quick,
`make test-faults` all of them, but for those that another test runs.

`make --dry-run` names the program, which then runs in a forked process, because a start of Python
with torch costs five seconds.
"""

import os
import re
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import scmoe
from experiments.engine.ranks import run_ranks
from scmoe.command_line import call
from scmoe.config.registry import ARCHITECTURES, ROUTERS
from scmoe.moe.router import Scoring, by_sign
from tests.support.commands import train_on_text, undocumented
from tests.support.forked import python
from tests.support.pages import GUIDES, ROOT, blocks, commands

NAMES = (
    *("quickstart", "configuration", "data", "runs", "inference", "hugging-face", "sweep"),
    *("strategy", "extending", "tests", "would-it-pay"),
)
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
NOT_RUN = {"docs/ranks.md": "needs eight GPUs; tests/docs/test_launch_files.py"}
HERE = ("configs/debug.yaml", "make estimate")  # what two CPU cores can run of it
SMALL = [line for line in commands("docs/ranks.md") if any(words in line for words in HERE)]
COMMANDS = list(dict.fromkeys([line for page in PAGES for line in commands(page)] + SMALL))
RESULTS = "\n".join(page.read_text() for page in sorted((ROOT / "docs/results").rglob("*.md")))
MEASURING = sorted(set(re.findall(r"^`(make [^`]+)`", RESULTS, re.MULTILINE)))  # they take hours
AS_WRITTEN, PYTHON = "make setup", ".venv/bin/python"
QUICK = (
    "trainer.max_steps=3 trainer.val_every=3 trainer.checkpoint_every=3 trainer.log_every=1"
    " data.val_sequences=8 trainer.threads=1"
)
SMALLER = f"model.layers=2 model.dim=64 model.heads=2 {QUICK}"
(COUNTED,) = (command for command in COMMANDS if "--counted" in command)
ELSEWHERE = {  # command: the test that makes its run
    "make test": "tests/docs/test_readme.py",
    "make train CONFIG=configs/quickstart_vision.yaml": "tests/training/run/test_vision.py",
    "make reproduce SCALE=smoke": "tests/experiments/test_table.py",
    **{
        f'make train CONFIG=configs/debug.yaml ARGS="trainer.devices=2 {words}"': (
            "tests/training/run/test_train.py"
        )
        for words in ("schedule=auto trainer.max_steps=70", "schedule.slot=2 schedule.chunks=2")
    },
}
SHORT = {
    "make figure13": [*("make", "figure13", "ARGS=--quick --architectures scmoe_pos2 --tokens 4")],
    "make train": ["make", "train", f"ARGS={SMALLER}"],
    'make resume ARGS="trainer.max_steps=400"': [
        *("make", "resume", "ARGS=trainer.max_steps=5 trainer.devices=1 strategy.ep_size=1")
    ],
    **{
        f"make train CONFIG=configs/quickstart_{name}.yaml": [
            *("make", "train", f"CONFIG=configs/quickstart_{name}.yaml", f"ARGS={QUICK}")
        ]
        for name in ("longcat", "instella")
    },
    "make evaluate": ["make", "evaluate", "ARGS=--stride 256 --text docs/quickstart.md"],
    'make advise CONFIG=gpt2_moe_medium ARGS="cluster=2x8xA100"': [
        *("make", "advise", "CONFIG=gpt2_moe_medium", "ARGS=cluster=2x8xA100 model.layers=4")
    ],
    COUNTED: shlex.split(COUNTED.removesuffix('"') + ' model.layers=2"'),
    'make train ARGS="init_from=scmoe:exported/model.safetensors name=further"': [
        *(
            "make",
            "train",
            f"ARGS=init_from=scmoe:exported/model.safetensors name=further {SMALLER}",
        )
    ],
}
SAYS = {
    "make figure13": '"equal_bits": true',
    "make train": '"steps": 3',
    'make resume ARGS="trainer.max_steps=400"': '"steps": 5',
    "make evaluate": '"perplexity": ',
    "make train CONFIG=configs/quickstart_longcat.yaml": '"steps": 3',
    "make train CONFIG=configs/quickstart_instella.yaml": '"steps": 3',
    ".venv/bin/python docs/examples/longcat_roundtrip.py": "model_type longcat_flash",
    "make sweep CONFIG=configs/sweep/smoke.yaml": '"best": {',
    "make list": "configs/quickstart.yaml",
    'make train CONFIG=docs/examples/my_architecture.yaml ARGS="trainer.devices=2"': (
        "step 4: between"
    ),
    'make list ARGS="extensions=[docs.examples.my_architecture]"': "moe.architecture=parallel",
    'make check-data CONFIG=configs/debug.yaml ARGS="data.name=text data.path=docs/decisions'
    ' data.vocab_size=512"': "all data of text can be read",
    ".venv/bin/python docs/examples/load_hf.py exported/hf": "ScMoEForCausalLM",
    ".venv/bin/python docs/examples/load_export.py exported/model.safetensors": (
        "likeliest next token"
    ),
    'make train ARGS="init_from=scmoe:exported/model.safetensors name=further"': "runs/further/",
}
SLOW = (  # the verbs themselves run in other tests
    *("make figure13", "make sweep CONFIG=configs/sweep/smoke.yaml"),
    *("make evaluate", 'make resume ARGS="trainer.max_steps=400"'),
    'make advise CONFIG=gpt2_moe_medium ARGS="cluster=2x8xA100"',
    *(line for line in SMALL if "torchrun" in line),
)
KINDS = {
    command.removeprefix("make ").split()[0]: command for command in reversed(COMMANDS)
}  # the first of each kind


def with_marks(command: str) -> object:
    quick = command in KINDS.values() and command not in SLOW
    return pytest.param(
        command, marks=[pytest.mark.faults, *([pytest.mark.representative] if quick else [])]
    )


pytestmark = [pytest.mark.smoke, pytest.mark.ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not (ROOT / ".venv/.installed").exists():
        pytest.skip("the commands need the environment that `make setup` makes")
    if subprocess.run(["make", "--question", ".venv/.installed"], cwd=ROOT, check=False).returncode:
        pytest.fail(
            "the environment is out of date: run `make setup`, or the commands install the folder"
            " of links"
        )
    folder = tmp_path_factory.mktemp("checkout")
    (ROOT / ".cache").mkdir(exist_ok=True)  # prepared data may be shared
    places = ("configs", "datamodules", "docs", "experiments", "scmoe")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".venv", ".cache", *places):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command, folder):
    """Return what the command prints on standard output and on standard error."""
    outer = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    if command[0] == PYTHON:
        code, out, err = python(*command[1:], cwd=folder, env=env, timeout_s=250)
    else:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=250, env=env
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 0, f"{command}\n{out}\n{err}"
    return out, err


def test_the_quickstart_is_three_commands():
    assert commands("README.md") == ["make setup", "make train", "make generate"]
    assert SHORT.keys() | SAYS.keys() <= set(COMMANDS), "a shortened command is on no page"
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


def test_every_page_with_commands_is_run_or_says_why_not():
    pages = [
        page.relative_to(ROOT).as_posix()
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    ]
    assert {page for page in pages if blocks(page, "bash")} == {
        page for page in PAGES if commands(page)
    } | set(NOT_RUN)
    assert SMALL, "docs/ranks.md has a command that two CPU cores can run"


def of_make(command: list[str], folder: Path) -> list[str]:
    """Return the lines that make would run."""
    return run(["make", "--dry-run", *command[1:]], folder)[0].splitlines()


@pytest.mark.parametrize(
    "command", [with_marks(command) for command in COMMANDS if command not in ELSEWHERE]
)
def test_every_command_runs(command, folder):
    """Commands run in the order of the pages: resume and generate use the newest run."""
    words = SHORT.get(command, shlex.split(command))
    if words[0] == "make" and command != AS_WRITTEN:
        (line,) = of_make(words, folder)
        words = shlex.split(line)
        if "configs/debug.yaml" in words and "train" in words:
            words.append("runs_dir=aside")  # later pages read the newest run of the quickstart
    out, err = run(words, folder)
    assert SAYS.get(command, "") in out + err
    assert out.strip(), "the command prints nothing"


@pytest.mark.parametrize("command", MEASURING)
def test_every_measurement_has_a_target(command, folder):
    program = "".join(of_make(shlex.split(command), folder))
    assert re.search(r"-m (experiments\.|scmoe |docs\.build\.)", program)


def test_every_logged_metric_is_in_the_table(folder):
    """The metrics are those of the runs that the commands above leave; test_train.py and
    test_vision.py have others."""
    files = list(folder.glob("runs/*/*/metrics.csv"))
    if not files:
        pytest.skip("no command of the pages has run in this session")
    logged = {name for file in files for name in file.read_text().partition("\n")[0].split(",")}
    assert {"train/loss", "val/loss", "moe/load_max"} <= logged
    assert not [name for file in files for name in undocumented(file)]


def run_script(rank: int, world_size: int, script: Path) -> None:
    runpy.run_path(str(script), run_name="__main__")


def test_the_script_of_the_strategy_runs():
    run_ranks(run_script, 2, ROOT / "docs/examples/expert_parallel.py")


# ---------------------------------------------------------------------- Python of the pages

SCRIPTS = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/examples").glob("*.py")]


def unindented(code: str) -> str:
    return "\n".join(line.strip() for line in code.strip().splitlines())


def is_in_a_script(block: str) -> bool:
    """Return whether a block is part of a script of docs/examples, all of which run in a test."""
    return any(unindented(block) in unindented(script) for script in SCRIPTS)


PYTHON_BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in GUIDES
    for number, block in enumerate(blocks(page, "python"))
    if not is_in_a_script(block)
]


def rows(number: int) -> DataLoader[Any]:
    """Return one batch of this number of tensors."""
    return DataLoader(TensorDataset(*(torch.randn(2, 16, 64) for _ in range(number))), batch_size=2)


@pytest.fixture(scope="module")
def at_a_run(tmp_path_factory):
    """Return a folder with what the blocks read: runs/latest, its exports, a checkpoint of a
    module of one's own, and the class of that module."""
    folder = tmp_path_factory.mktemp("python")
    sizes = (
        "data.seq_len=64",
        "model.layers=4",
        "trainer.max_steps=2",
        "analysis.record_routing=1",
    )
    run_dir = train_on_text(folder, 1, *sizes)
    (folder / "runs").mkdir()
    (folder / "runs/latest").symlink_to(run_dir)
    for words in ((), ("--format", "hf")):
        out = folder / "exported" / ("hf" if words else "model.safetensors")
        assert call("export", str(run_dir), "--out", str(out), *words) == 0
    regression: Any = runpy.run_path(str(ROOT / "docs/examples/expert_parallel.py"))["Regression"]

    class MyModule(regression):
        def predict_step(self, batch):
            return self.moe(batch[0])[0]

    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}
    strategy = scmoe.ExpertParallelStrategy()
    trainer = Trainer(strategy=strategy, max_steps=1, enable_checkpointing=False, **quiet)
    trainer.fit(MyModule(), rows(2))
    trainer.save_checkpoint(folder / "checkpoints/step=100.ckpt")
    return folder, MyModule


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_python_can_be_copied(block, at_a_run, monkeypatch):
    """A block runs as it is, with the names that its page has explained before it."""
    folder, my_module = at_a_run
    monkeypatch.chdir(folder)
    for registry in (ROUTERS, ARCHITECTURES):
        monkeypatch.setattr(registry, "makers", dict(registry.makers))
    names = {"scmoe": scmoe, "torch": torch, "Path": Path, "Scoring": Scoring, "by_sign": by_sign}
    names |= {"Trainer": Trainer, "MyModule": my_module, "loader": rows(1)}
    names |= {"x": torch.randn(1, 4, 256), "task_loss": lambda y: y.square().mean()}
    names |= {
        "model": scmoe.load("exported/model.safetensors"),
        "ids": torch.zeros(1, 8, dtype=torch.int64),
    }
    exec(block, names)
