"""Rooms keep their order and their budgets of lines, imports have no circle, and some things exist
only once."""

import ast
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for top in ("scmoe", "datamodules", "experiments")
    for path in sorted((ROOT / top).rglob("*.py"))
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}

# A room may import itself and what stands above it. The laboratory imports the library, never the
# other way.
LIBRARY = (
    "scmoe/files",
    "scmoe/schedule",
    "scmoe/config",
    "scmoe/moe",
    "scmoe/blocks",
    "scmoe/models",
    "scmoe/planning",
    "scmoe/probes",
    "scmoe/inference",
    "scmoe/footprint",
    "scmoe/parallel",
    "scmoe/api.py",
    "scmoe/init_from",
    "scmoe/lightning",
    "datamodules",
    "scmoe/training",
    "scmoe/runs",
    "scmoe/hf.py",
    "scmoe/__init__.py",
    "scmoe/report.py",
    "scmoe/command_line.py",
    "scmoe/estimate",
    "scmoe/sweeps",
    "scmoe/cli",
    "scmoe/__main__.py",
)
LABORATORY = (
    "experiments/engine",
    "experiments/bench",
    "experiments/tables",
    "experiments/figures",
    "experiments",
)  # the last one: the entries, a file for each verb
ROOMS = [*LIBRARY, *LABORATORY]
CLOSURES = {  # files that are read for one idea
    "scmoe/moe/stream.py": 11,
    "scmoe/lightning/strategy.py": 32,
    "scmoe/training/run/train.py": 83,
}
HASATTR = 2
ONLY_IN = {  # outer module: where it may be used
    "torch.distributed": (
        *(
            "scmoe/parallel/",
            "scmoe/planning/",
            "scmoe/lightning/",
            "scmoe/api.py",
            "scmoe/runs/evaluate/scoring.py",
        ),
        "scmoe/estimate/",
        "experiments/",
    ),
    "lightning": ("scmoe/lightning/", "scmoe/training/", "datamodules/", "experiments/"),
    "pytorch_lightning": (),  # its other name
    "os.environ": (
        *(
            "scmoe/parallel/mesh.py",
            "scmoe/training/run/",
            "scmoe/files/writing.py",
            "scmoe/sweeps/",
        ),
        "experiments/",
    ),
    "os.getenv": (),
    **{
        f"{module}.{name}": (
            "scmoe/",
            "experiments/engine/clock.py",
            "experiments/tables/results.py",
        )
        for module, name in (
            ("statistics", "median"),
            ("statistics", "quantiles"),
            ("np", "median"),
        )
    },
    "rich.console.Console": (
        *("scmoe/", "datamodules/", "scmoe/report.py", "scmoe/sweeps/batch.py"),
    ),
    "os.putenv": (),
}


ONCE = {  # what exists in one place: a pattern, and the files where it may stand
    r"\bDistributedDataParallel\(": ("scmoe/parallel/update/wrap.py",),
    r"\bfully_shard\(": ("scmoe/parallel/dense.py",),
    r'"data_offsets": ': ("scmoe/files/writing.py",),
    r"\bos\.(replace|rename)\(|\bpartial\.replace\(": (
        *("scmoe/files/writing.py", "scmoe/parallel/checkpoint/durable.py"),
        *("datamodules/text.py", "scmoe/training/run/directory.py"),  # a folder, a link
    ),
}


def room_of(path: str) -> str:
    """Returns the room of a file: the longest name in ROOMS that its path begins with."""
    return max((room for room in ROOMS if path == room or path.startswith(f"{room}/")), key=len)


def names_used(tree: ast.AST) -> set[str]:
    """Returns the dotted names of everything that is imported or reached through a plain name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}"
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def file_of(name: str) -> str | None:
    """Returns the product's file that a dotted name lies in, None for other names."""
    first, *rest = name.split(".")
    parts = [first, *rest] if first in ("datamodules", "experiments") else rest
    if first == "scmoe" and rest[:1] != ["datamodules"]:
        parts = ["scmoe", *rest]
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if first in ("scmoe", "datamodules", "experiments") and file in TREES:
                return file
    return None


def violations(path: str, source: str) -> list[str]:
    """Returns what a file imports or uses against the order of rooms and the places of outer
    modules."""
    found = []
    for name in sorted(names_used(ast.parse(source))):
        if name.startswith("."):
            found.append(f"{path}: {name} is relative")
        other = file_of(name)
        if other and ROOMS.index(room_of(other)) > ROOMS.index(room_of(path)):
            found.append(f"{path}: {name} is in a later room")
        if other and path.startswith("datamodules/") and not other.startswith("datamodules/"):
            found.append(f"{path}: {name}, datamodules import no other room")
        for outer, places in ONLY_IN.items():
            if f"{name}.".startswith(f"{outer}.") and not path.startswith(places):
                found.append(f"{path}: {name} is allowed only in {places}")
        if path.startswith("scmoe/schedule/") and name.split(".")[0] == "torch":
            found.append(f"{path}: schedule must not import torch")
    return found


IMPORTS = {
    path: {file for name in names_used(tree) if (file := file_of(name))} - {path}
    for path, tree in TREES.items()
}


def test_every_file_keeps_the_order_of_rooms():
    assert [found for path, source in TEXTS.items() for found in violations(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("scmoe/moe/router.py", "from scmoe.blocks.shortcut import ShortcutBlock"),
        ("scmoe/moe/router.py", "import scmoe.training.assembly.model"),
        ("scmoe/moe/router.py", "def f():\n    from scmoe.parallel import mesh"),
        ("scmoe/moe/router.py", "if TYPE_CHECKING:\n    from scmoe.models.decoder import GPT"),
        ("scmoe/moe/router.py", "from ..blocks import shortcut"),
        ("scmoe/moe/router.py", "import torch.distributed as dist"),
        ("scmoe/moe/router.py", "from torch import distributed"),
        ("scmoe/moe/router.py", "import torch\ntorch.distributed.get_rank()"),
        ("scmoe/moe/router.py", "import os\nos.environ['A']"),
        ("scmoe/moe/router.py", "from os import environ"),
        ("scmoe/moe/router.py", "import os\nos.getenv('A')"),
        ("scmoe/schedule/schedule.py", "from torch import Tensor"),
        ("scmoe/parallel/mesh.py", "import lightning"),
        ("scmoe/parallel/mesh.py", "from scmoe.lightning.seam import is_fitting"),
        ("scmoe/training/run/train.py", "from experiments.engine.ranks import run_ranks"),
        ("datamodules/text.py", "from scmoe.moe.tokens import Routing"),
        ("datamodules/text.py", "from experiments import table"),
        ("experiments/engine/ranks.py", "from experiments.bench.layer import bench_layer"),
        ("experiments/bench/layer.py", "from experiments.tables.make import make_runs"),
        ("experiments/bench/layer.py", "from statistics import median"),
        ("experiments/bench/layer.py", "from rich.console import Console"),
    ],
)
def test_a_file_against_the_order_is_reported(path, source):
    assert len(violations(path, source)) >= 1


def test_imports_have_no_circle_of_files_or_folders():
    folder = {path: str(PurePosixPath(path).parent) for path in TREES}
    folder["scmoe/__main__.py"] = (
        "the command"  # python -m needs it in this folder, whose files do not import it
    )
    folders = {name: set[str]() for name in folder.values()}
    for path, others in IMPORTS.items():
        folders[folder[path]] |= {folder[other] for other in others} - {folder[path]}
    for graph in (IMPORTS, folders):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" > ".join(error.args[1]))


def test_file_names_are_unique():
    """A verb's entry may have the name of what it calls."""
    rooms = [
        PurePosixPath(path).name
        for path in TREES
        if room_of(path) not in ("experiments", "scmoe/cli")
    ]
    twice = [
        name
        for name, n in Counter(rooms).items()
        if n > 1 and name not in ("__init__.py", "__main__.py")
    ]
    assert twice == []


def test_few_files_are_read_for_a_stream_a_strategy_or_a_training():
    for path, most in CLOSURES.items():
        seen, todo = {path}, [path]
        while todo:
            new = IMPORTS[todo.pop()] - seen
            seen |= new
            todo += new
        read = {file for file in seen if TEXTS[file]}
        assert len(read) <= most, f"{path}: {len(read)}"


def test_some_things_exist_once():
    for pattern, places in ONCE.items():
        assert {path for path, text in TEXTS.items() if re.search(pattern, text)} <= {*places}, (
            pattern
        )


def test_no_project_class_overrides_a_method_of_another():
    """Subclasses of modules, Lightning's classes and protocols fill in what is missing; other
    classes are final."""
    classes = {
        node.name: node
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    methods = {
        name: {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
        for name, node in classes.items()
    }
    for name, node in classes.items():
        for base in {ast.unparse(base) for base in node.bases} & classes.keys():
            if not fills_in(base, classes):
                assert methods[name] & methods[base] <= {"__init__"}, f"{name} overrides {base}"


def fills_in(name: str, classes: dict[str, ast.ClassDef]) -> bool:
    """Returns whether a class derives from a Protocol, a module, or a class of Lightning."""
    bases = {ast.unparse(base) for base in classes[name].bases}
    outer = {"Protocol", "nn.Module", "LightningModule", "LightningDataModule"}
    return bool(bases & outer) or any(fills_in(base, classes) for base in bases & classes.keys())


def test_hasattr_is_rare():
    """A protocol or a base class says what an object has."""
    calls = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        if path.startswith("scmoe/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "hasattr"
    ]
    assert len(calls) <= HASATTR, calls


def without_encoding(tree: ast.AST) -> list[int]:
    """Returns the lines of calls that read or write text in the locale's encoding."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if is_method else ast.unparse(node.func)
        of_module = is_method and ast.unparse(node.func.value) in ("os", "gzip", "self.job")
        if name == "open" and not of_module:
            place = 0 if is_method else 1  # of the mode
            given = [
                *node.args[place : place + 1],
                *(k.value for k in node.keywords if k.arg == "mode"),
            ]
            is_text = not any("b" in ast.unparse(mode) for mode in given)
        else:
            is_text = is_method and name in ("read_text", "write_text")
        has_encoding = any(k.arg == "encoding" for k in node.keywords) or any(
            isinstance(word, ast.Constant) and word.value == "utf-8" for word in node.args
        )
        if is_text and not has_encoding:
            lines.append(node.lineno)
    return lines


def test_text_is_read_and_written_in_utf_8_whatever_the_locale():
    scripts = [*(ROOT / "docs/hooks").glob("*.py"), *(ROOT / "docs/examples").glob("*.py")]
    trees = TREES | {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in scripts}
    assert {path: lines for path, tree in trees.items() if (lines := without_encoding(tree))} == {}
    wrong = (
        "open('a')\np.open()\nopen('a', 'w')\np.open('a',"
        " newline='')\np.read_text()\np.write_text(t)\n"
    )
    right = (
        "open('a', 'rb')\np.open(mode='ab')\np.open(encoding='utf-8')\nos.open(p,"
        " f)\nwrite_text(t)\n"
    )
    assert without_encoding(ast.parse(wrong + right)) == [1, 2, 3, 4, 5, 6]


def test_a_blocks_schedule_is_set_in_one_place():
    places = {
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "schedule"
        and isinstance(node.ctx, ast.Store)
    }
    assert {place.split(":")[0] for place in places} == {"scmoe/blocks/moe_block.py"}
