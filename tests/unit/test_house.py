"""The product's files and classes are small, its imports have no circle, and a few things exist only once."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for top in ("scmoe", "datamodules", "experiments") for path in sorted((ROOT / top).rglob("*.py"))]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
FILE_LINES, SCRIPT_LINES, SCRIPTS = 300, 100, 23
CLASS_LINES, CLASS_METHODS = 180, 25
HASATTR = 2


def lines_of(path: str) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_no_file_and_no_class_is_too_long():
    assert {path: lines_of(path) for path in TREES if lines_of(path) > FILE_LINES} == {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) for child in node.body)
                size = node.end_lineno - node.lineno + 1
                assert size <= CLASS_LINES and methods <= CLASS_METHODS, f"{path} {node.name}: {size}, {methods}"


def test_scripts_are_few_and_thin():
    scripts = [path for path in TREES if path.startswith("experiments/")]
    assert len(scripts) <= SCRIPTS
    assert {path: lines_of(path) for path in scripts if lines_of(path) > SCRIPT_LINES} == {}


def modules_imported(path: str) -> set[str]:
    """Returns the product's files that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    names |= {name.removeprefix("scmoe.") for name in names}  # scmoe/datamodules is a link to datamodules
    return {file for name in names if (file := f"{name.replace('.', '/')}.py") in TREES}


def test_imports_have_no_circle():
    try:
        TopologicalSorter({path: modules_imported(path) for path in TREES}).prepare()
    except CycleError as error:
        pytest.fail(" > ".join(error.args[1]))


def test_hasattr_is_rare():
    """A protocol or a base class says what an object has."""
    calls = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        if path.startswith("scmoe/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
    ]
    assert len(calls) <= HASATTR, calls


def test_a_blocks_schedule_is_set_in_one_place():
    places = {
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "schedule" and isinstance(node.ctx, ast.Store)
    }
    assert {place.split(":")[0] for place in places} == {"scmoe/blocks/moe_block.py"}
