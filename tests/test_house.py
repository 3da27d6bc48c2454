"""Rooms keep their order, imports have no circle, some things exist once, and code has air.

Nobody counts lines: the two budgets only say that a jump needs a reason.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for top in ("scmoe", "datamodules", "experiments")
    for path in sorted((ROOT / top).rglob("*.py"))
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}


@cache
def trees() -> dict[str, ast.Module]:
    """Return the parsed files. Every worker of pytest imports this file, and one of them needs
    them."""
    return {path: ast.parse(text) for path, text in TEXTS.items()}


@cache
def names() -> dict[str, set[str]]:
    return {path: names_used(tree) for path, tree in trees().items()}


# A room may import itself and what stands above it. The laboratory imports the library, never the
# other way.
LIBRARY = (
    "scmoe/files.py",
    "scmoe/schedule",
    "scmoe/moe",
    "scmoe/blocks",
    "scmoe/models",
    "scmoe/parallel",
    "scmoe/planning",
    "scmoe/inference",
    "scmoe/api.py",
    "scmoe/config",
    "scmoe/loads.py",
    "scmoe/weights",
    "scmoe/charts.py",
    "scmoe/report.py",
    "scmoe/lightning",
    "datamodules",
    "scmoe/training",
    "scmoe/predict",
    "scmoe/runs",
    "scmoe/conform",
    "scmoe/hf.py",
    "scmoe/__init__.py",
    "scmoe/command_line.py",
    "scmoe/sweeps",
    "scmoe/cli",
    "scmoe/__main__.py",
)
LABORATORY = (
    "experiments/engine",
    "experiments/bench",
    "experiments/simulate",
    "experiments/tables",
    "experiments/figures",
    "experiments",  # the entries, a file for each verb
)
ROOMS = [*LIBRARY, *LABORATORY]
HASATTR = 2


COLUMNS = 100
FILE_LINES = 400
LONGER_FILES: set[str] = set()
VALUES = 2  # of one assignment; shapes and returned tuples are unpacked in any number
PARAMETERS = 8
MORE_PARAMETERS = {  # functions that may have more
    "scmoe/api.py": {"MoE", "ScMoEBlock"},  # constructors of public parts
    "scmoe/hf.py": {"forward"},  # the signature is that of transformers
    "scmoe/runs/hf_base.py": {"forward"},  # likewise
}
VAGUE = {"own", "found", "given", "place", "middle", "at", "of"}
VAGUE_NAMES = 40

# The statistics of the tables are the laboratory's only medians beside the library's clock.
_MEDIANS = ("scmoe/", "experiments/tables/seed_statistics.py")
ONLY_IN = {  # outer module: where it may be used
    "torch.distributed": (
        "scmoe/parallel/",
        "scmoe/planning/",
        "scmoe/lightning/",
        "scmoe/api.py",
        "scmoe/runs/evaluate/scoring.py",
        "scmoe/predict/",
        "scmoe/conform/",
        "experiments/",
    ),
    "lightning": ("scmoe/lightning/", "scmoe/training/", "datamodules/", "experiments/"),
    "pytorch_lightning": (),  # its other name
    "os.environ": (
        "scmoe/parallel/mesh.py",
        "scmoe/training/run/",
        "scmoe/files.py",
        "scmoe/sweeps/",
        "scmoe/conform/rank_pool.py",
        "experiments/",
    ),
    "os.getenv": (),
    "os.putenv": (),
    "statistics.median": _MEDIANS,
    "statistics.quantiles": _MEDIANS,
    "np.median": _MEDIANS,
    "rich.console.Console": ("scmoe/", "datamodules/"),
}
ONCE = {  # what exists in one place: a pattern, and the files where it may stand
    r"\bDistributedDataParallel\(": (
        "scmoe/parallel/update/wrap.py",
        "experiments/conform/st_moe.py",  # another library, as its users train it
    ),
    r"\bfully_shard\(": ("scmoe/parallel/dense/sharded.py",),
    r'"data_offsets": ': ("scmoe/files.py",),
    r"\bos\.(replace|rename)\(|\bpartial\.replace\(": (
        "scmoe/files.py",
        "scmoe/parallel/checkpoint/durable.py",
        "datamodules/token_cache.py",  # a folder
        "scmoe/training/run/directory.py",  # a link
    ),
}


def room_of(path: str) -> str:
    """Return the room of a file: the longest name in ROOMS that its path begins with."""
    return max((room for room in ROOMS if path == room or path.startswith(f"{room}/")), key=len)


def names_used(tree: ast.AST) -> set[str]:
    """Return the dotted names of everything that is imported or reached through a plain name."""
    return names_in(ast.walk(tree))


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"{'.' * node.level}{node.module or ''}"
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def file_of(name: str) -> str | None:
    """Return the product's file that a dotted name lies in, None for other names."""
    first, *rest = name.split(".")
    parts = [first, *rest] if first in ("datamodules", "experiments") else rest
    if first == "scmoe" and rest[:1] != ["datamodules"]:
        parts = ["scmoe", *rest]
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if first in ("scmoe", "datamodules", "experiments") and file in TEXTS:
                return file
    return None


def violations(path: str, source: str) -> list[str]:
    """Return what a file imports or uses against the order of rooms and ONLY_IN."""
    wrong = []
    is_known = TEXTS.get(path) == source
    for name in sorted(names()[path] if is_known else names_used(ast.parse(source))):
        if name.startswith("."):
            wrong.append(f"{path}: {name} is relative")
        other = file_of(name)
        if other and ROOMS.index(room_of(other)) > ROOMS.index(room_of(path)):
            wrong.append(f"{path}: {name} is in a later room")
        if other and path.startswith("datamodules/") and not other.startswith("datamodules/"):
            wrong.append(f"{path}: {name}, datamodules import no other room")
        for outer, allowed in ONLY_IN.items():
            if f"{name}.".startswith(f"{outer}.") and not path.startswith(allowed):
                wrong.append(f"{path}: {name} is allowed only in {allowed}")
        if path.startswith("scmoe/schedule/") and name.split(".")[0] == "torch":
            wrong.append(f"{path}: schedule must not import torch")
    return wrong


@cache
def imports() -> dict[str, set[str]]:
    """Return for each file the product's files that it imports."""
    return {
        path: {file for name in used if (file := file_of(name))} - {path}
        for path, used in names().items()
    }


def test_every_file_keeps_the_order_of_rooms():
    assert [line for path, source in TEXTS.items() for line in violations(path, source)] == []


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
        ("scmoe/parallel/mesh.py", "from scmoe.lightning.seam.loops import is_fitting"),
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


def test_contributing_names_where_outer_modules_may_be_used():
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    begins = {
        "torch.distributed": "- `torch.distributed` is used in ",
        "lightning": "- `lightning` is used in ",
        "os.environ": "- Environment variables are read or set in ",
    }
    for outer, begin in begins.items():
        (line,) = (line for line in lines if line.startswith(begin))
        named = re.findall(r"`([\w/.]+)`", line.removeprefix(begin).partition(" only")[0])
        assert {*named} == {*ONLY_IN[outer]} - {"experiments/"}, outer


def test_imports_have_no_circle_of_files_or_folders():
    folder = {path: str(PurePosixPath(path).parent) for path in trees()}
    # A file at the first level is a room of its own. python -m needs __main__.py in its folder,
    # whose other files do not import it.
    folder |= {path: path for path in folder if path.startswith("scmoe/") and path.count("/") == 1}
    folder |= {path: path for path in folder if PurePosixPath(path).name == "__main__.py"}
    folders = {name: set[str]() for name in folder.values()}
    for path, others in imports().items():
        folders[folder[path]] |= {folder[other] for other in others} - {folder[path]}
    for graph in (imports(), folders):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" > ".join(error.args[1]))


def test_file_names_are_unique():
    """A verb's entry, and what it does with a run, may have the name of what they call."""
    rooms = [
        PurePosixPath(path).name
        for path in trees()
        if room_of(path) not in ("experiments", "scmoe/cli", "scmoe/runs")
    ]
    twice = [
        name
        for name, n in Counter(rooms).items()
        if n > 1 and name not in ("__init__.py", "__main__.py")
    ]
    assert twice == []


def test_the_name_of_a_class_or_constant_means_one_thing():
    defined = [name for tree in trees().values() for name in classes_and_constants(tree)]
    assert [name for name, n in Counter(defined).items() if n > 1] == []


def classes_and_constants(tree: ast.Module) -> Iterable[str]:
    """Yield the names of the classes and constants that a file defines at its top level."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            set_here = (each for target in targets for each in ast.walk(target))
            yield from (n.id for n in set_here if isinstance(n, ast.Name) and n.id.isupper())


def test_some_things_exist_once():
    for pattern, allowed in ONCE.items():
        users = {path for path, text in TEXTS.items() if re.search(pattern, text)}
        assert users <= {*allowed}, pattern


def test_no_project_class_overrides_a_method_of_another():
    """Subclasses of modules, Lightning's classes and protocols fill in what is missing; other
    classes are final."""
    classes = {
        node.name: node
        for tree in trees().values()
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
    """Return whether a class derives from a Protocol, a module, or a class of Lightning."""
    bases = {ast.unparse(base) for base in classes[name].bases}
    outer = {"Protocol", "nn.Module", "LightningModule", "LightningDataModule"}
    return bool(bases & outer) or any(fills_in(base, classes) for base in bases & classes.keys())


def test_hasattr_is_rare():
    """A protocol or a base class says what an object has."""
    calls = [
        f"{path}:{node.lineno}"
        for path, tree in trees().items()
        if path.startswith("scmoe/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "hasattr"
    ]
    assert len(calls) <= HASATTR, calls


def without_encoding(tree: ast.AST) -> list[int]:
    """Return the lines of calls that read or write text in the locale's encoding."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if is_method else ast.unparse(node.func)
        of_module = is_method and ast.unparse(node.func.value) in ("os", "gzip", "self.job")
        if name == "open" and not of_module:
            index = 0 if is_method else 1
            modes = node.args[index : index + 1]
            modes += [k.value for k in node.keywords if k.arg == "mode"]
            is_text = not any("b" in ast.unparse(mode) for mode in modes)
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
    every = trees() | {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in scripts}
    assert {path: lines for path, tree in every.items() if (lines := without_encoding(tree))} == {}
    wrong = [
        "open('a')",
        "p.open()",
        "open('a', 'w')",
        "p.open('a', newline='')",
        "p.read_text()",
        "p.write_text(t)",
    ]
    right = [
        "open('a', 'rb')",
        "p.open(mode='ab')",
        "p.open(encoding='utf-8')",
        "os.open(p, f)",
        "write_text(t)",
    ]
    assert without_encoding(ast.parse("\n".join(wrong + right))) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("attribute", "place"),
    [("schedule", "scmoe/blocks/moe_block.py"), ("batches_in_flight", "scmoe/models/run_as.py")],
)
def test_how_a_model_runs_is_set_in_one_place(attribute, place):
    """And of a Halves in its own constructor."""
    users = {
        path
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.ctx, ast.Store)
    }
    assert users - {"scmoe/models/halves.py"} == {place}


# ---------------------------------------------------------------------- air


def long_lines(text: str) -> list[int]:
    """Return the numbers of the lines over COLUMNS."""
    return [i for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]


def test_a_file_of_the_product_has_room_for_one_idea():
    long = {path for path, text in TEXTS.items() if len(text.splitlines()) > FILE_LINES}
    assert long <= LONGER_FILES, long - LONGER_FILES


def packed(tree: ast.AST) -> list[int]:
    """Return the lines of assignments that set more than VALUES values at once."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
        and len(node.value.elts) > VALUES
    ]


def crowded(tree: ast.AST) -> set[str]:
    """Return the functions with more than PARAMETERS parameters; constructors may have more."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__":
            parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            counted = [one for one in parameters if one.arg not in ("self", "cls", "ctx")]
            if len(counted) > PARAMETERS:
                names.add(node.name)
    return names


def vague_names(tree: ast.AST) -> list[int]:
    """Return the lines where a name of VAGUE is assigned, or is that of a function."""
    lines = []
    for node in ast.walk(tree):
        is_stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        if is_stored and node.id in VAGUE:
            lines.append(node.lineno)
        if isinstance(node, ast.FunctionDef) and node.name in VAGUE:
            lines.append(node.lineno)
    return lines


def test_lines_have_at_most_100_columns():
    assert {path: lines for path, text in TEXTS.items() if (lines := long_lines(text))} == {}


def test_no_assignment_sets_three_values_at_once():
    assert {path: lines for path, tree in trees().items() if (lines := packed(tree))} == {}


def test_functions_have_at_most_eight_parameters():
    assert {
        path: names
        for path, tree in trees().items()
        if (names := crowded(tree) - MORE_PARAMETERS.get(path, set()))
    } == {}


def test_vague_names_are_rare():
    """A name says what the thing is: `median`, not `middle`; `schedules`, not `own`."""
    lines = {path: vague_names(tree) for path, tree in trees().items()}
    where = {path: numbers for path, numbers in lines.items() if numbers}
    assert sum(len(numbers) for numbers in where.values()) <= VAGUE_NAMES, where


def test_code_without_air_is_found():
    source = (
        "a, b, c = 1, 2, 3\n"
        "a, b, c = x.shape\n"
        "def f(self, a, b, c, d, e, f, g, h, *, i): pass\n"
        "def g(self, a, b, c, d, e, f, g, h): pass\n"
        "for own in x: place = own.of\n"
    )
    tree = ast.parse(source)
    assert packed(tree) == [1]
    assert crowded(tree) == {"f"}
    assert vague_names(tree) == [5, 5]
    assert long_lines("x" * 100 + "\n" + "x" * 101) == [2]
