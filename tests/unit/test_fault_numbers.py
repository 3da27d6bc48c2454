"""Each fault of docs/faults.md has a test with its number in `make test-faults`, and ten or more in `make test`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = set(range(1, 77))
NUMBERED = re.compile(r"test_(?:fault_)?(\d\d)_")


def marked(path: Path, mark: str, decorators: list[ast.expr] | None = None) -> bool:
    """Returns whether a file's pytestmark, or a function's decorators, have pytest.mark.<mark>."""
    if decorators is not None:
        return any(f"pytest.mark.{mark}" in ast.unparse(decorator) for decorator in decorators)
    lines = re.search(r"^pytestmark = .*?^\]|^pytestmark = .*?$", path.read_text(), re.MULTILINE | re.DOTALL)
    return lines is not None and f"pytest.mark.{mark}" in lines[0]


def numbered() -> dict[str, tuple[int, bool]]:
    """Maps each file::test to its fault and whether it is representative. Reads only files that are marked `faults`."""
    found = {}
    for path in [*(ROOT / "tests").rglob("test_*.py")]:
        if not marked(path, "faults"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and (number := NUMBERED.match(node.name)):
                quick = marked(path, "representative") or marked(path, "representative", node.decorator_list)
                found[f"{path.name}::{node.name}"] = int(number[1]), quick
    return found


def test_every_fault_has_a_test_of_its_number():
    assert {fault for fault, _ in numbered().values()} == FAULTS


def test_ten_faults_are_in_the_default_run():
    assert len({fault for fault, quick in numbered().values() if quick}) >= 10


def test_the_table_has_every_fault_and_names_existing_files():
    rows = [line for line in (ROOT / "docs/faults.md").read_text().splitlines() if re.match(r"\| \d", line)]
    listed = set()
    for row in rows:
        for part in row.split("|")[1].split(","):
            first, _, last = part.strip().partition("-")
            listed |= set(range(int(first), int(last or first) + 1))
        for name in re.findall(r"`(tests/[^`]*)`", row):
            assert (ROOT / name).exists(), name
    assert listed == FAULTS
