"""A package imports only packages of earlier layers, and some outer modules are imported only in certain places."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    *(["charts", "schedule", "tokens"], ["config"], ["moe"], ["blocks"], ["models"]),
    *(
        ["parallel", "offload", "analysis"],
        ["inference"],
        ["datamodules"],
        ["training"],
        ["hf"],
        ["testbed"],
        ["studies"],
    ),
    *(["experiments"], ["__init__"]),
]
LAYER = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
ONLY_IN = {
    "torch.distributed": ("scmoe/parallel/", "scmoe/testbed/"),
    "lightning": (
        *("scmoe/training/", "datamodules/", "scmoe/lightning/seam.py"),
        *("scmoe/lightning/strategy.py", "scmoe/lightning/fail_fast.py", "scmoe/lightning/known_to_lightning.py"),
        "scmoe/lightning/refused_callbacks.py",
    ),
    "pytorch_lightning": (),  # its other name
    "os.environ": ("scmoe/parallel/mesh.py", "scmoe/training/run/", "scmoe/testbed/"),
    "os.getenv": (),
    "os.putenv": (),
}


def names_used(source: str) -> set[str]:
    """Returns the dotted names of everything that is imported or reached through a plain name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def package_of(name: str) -> str:
    """Returns the package of a dotted name: schedule for scmoe.schedule.cost, experiments for experiments.train."""
    first, *rest = name.split(".")
    return rest[0] if first == "scmoe" and rest else first


def violations(path: str, source: str) -> list[str]:
    """Returns the forbidden imports of a file. `path` is relative to the root."""
    package, found = package_of(path.removesuffix(".py").replace("/", ".")), []
    for name in sorted(names_used(source)):
        other, top = package_of(name), name.split(".")[0]
        layer, other_layer = LAYER.get(package, 0), LAYER.get(other, 0)
        if name.startswith("."):
            found.append(f"{path}: {name} is relative")
        if top in ("scmoe", "experiments", "datamodules") and other != package:
            if other_layer > layer or other_layer == layer > 0:
                found.append(f"{path}: {name} is not in an earlier layer")
            if package == "datamodules":
                found.append(f"{path}: {name}, datamodules import no other package")
        for outer, places in ONLY_IN.items():
            if f"{name}.".startswith(f"{outer}.") and not path.startswith(places):
                found.append(f"{path}: {name} is allowed only in {places}")
        if package == "schedule" and top == "torch":
            found.append(f"{path}: schedule must not import torch")
    return found


FILES = [path for top in ("scmoe", "datamodules", "experiments") for path in sorted((ROOT / top).rglob("*.py"))]


def test_every_file_keeps_the_order():
    names = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
    assert [found for name, source in names.items() for found in violations(name, source)] == []


def test_every_package_has_a_layer():
    packages = {package_of(".".join(path.with_suffix("").relative_to(ROOT).parts)) for path in FILES}
    assert packages - {"__init__"} <= LAYER.keys()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("scmoe/moe/router.py", "from scmoe.blocks.shortcut import ShortcutBlock"),
        ("scmoe/moe/router.py", "import scmoe.training.assembly.model"),
        ("scmoe/moe/router.py", "def f():\n    from scmoe import parallel"),
        ("scmoe/moe/router.py", "if TYPE_CHECKING:\n    from scmoe.models.gpt import GPT"),
        ("scmoe/moe/router.py", "from ..blocks import shortcut"),
        ("scmoe/moe/router.py", "import torch.distributed as dist"),
        ("scmoe/moe/router.py", "from torch import distributed"),
        ("scmoe/moe/router.py", "import torch\ntorch.distributed.get_rank()"),
        ("scmoe/moe/router.py", "import os\nos.environ['A']"),
        ("scmoe/moe/router.py", "from os import environ"),
        ("scmoe/moe/router.py", "import os\nos.getenv('A')"),
        ("scmoe/moe/router.py", "from scmoe.datamodules.text import TextDataModule"),
        ("scmoe/schedule/schedule.py", "from torch import Tensor"),
        ("scmoe/moe/tokens.py", "from scmoe.config.fields import Config"),
        ("scmoe/parallel/mesh.py", "import lightning"),
        ("scmoe/models/decoder.py", "from scmoe.inference.generate import generate"),
        ("scmoe/inference/generate.py", "from scmoe.training.assembly.model import build_model"),
        ("scmoe/planning/planner.py", "from scmoe.inference.offload.store import Store"),
        ("scmoe/training/assembly/model.py", "from scmoe.experiments.train import main"),
        ("scmoe/training/run.py", "from scmoe.experiments.engine.ranks import ranks"),
        ("datamodules/text.py", "from scmoe.moe.tokens import Routing"),
        ("datamodules/text.py", "from scmoe.experiments.engine.command_line import train"),
        ("experiments/train.py", "import lightning.pytorch"),
        ("experiments/studies/batch.py", "from scmoe.experiments.train import main"),
        ("experiments/bench/layer.py", "from scmoe.runs.seen import SeenRun"),
    ],
)
def test_bad_source_is_reported(path, source):
    assert len(violations(path, source)) >= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("scmoe/training/assembly/data.py", "from scmoe.datamodules.text import TextDataModule\nimport lightning"),
        ("scmoe/lightning/strategy.py", "from lightning.pytorch import Trainer\nimport torch.distributed"),
        ("scmoe/schedule/play.py", "import matplotlib.pyplot"),
        ("scmoe/config/load.py", "from scmoe.config.rules import validate\nimport os\nos.cpu_count()"),
        ("experiments/train.py", "from scmoe.training.run.train import train\nfrom scmoe.experiments.report import a"),
    ],
)
def test_good_source_is_not_reported(path, source):
    assert violations(path, source) == []
