"""A mutant is a bug that was made before, here or elsewhere, with the tests that must catch it.

tests/mutation/of_ranks.py and of_runs.py list them; mutate.py puts each alone into a copy of the
tree.
"""

from __future__ import annotations

from typing import NamedTuple

UNIT, DIST, FAULTS = "tests/unit", "tests/distributed", "tests/faults"
LIGHTNING, PARALLEL = "scmoe/lightning", "scmoe/parallel"
CHECKPOINT, UPDATE, WIRE = f"{PARALLEL}/checkpoint", f"{PARALLEL}/update", f"{PARALLEL}/wire"


class Mutant(NamedTuple):
    """A mutant is one replacement in one file, relative to the root. Tests are pytest node ids."""

    name: str
    file: str
    old: str = ""
    new: str = ""
    tests: tuple[str, ...] = ()

    def replaces(self, old: str, new: str) -> Mutant:
        return self._replace(old=old, new=new)

    def caught_by(self, *tests: str) -> Mutant:
        return self._replace(tests=tests)

    def mutate(self, source: str) -> str:
        """Return the source with the bug. ValueError: the text that it replaces does not occur
        exactly once."""
        if (times := source.count(self.old)) != 1:
            raise ValueError(
                f"mutant {self.name}: {self.old!r} occurs {times} times in {self.file}, allowed:"
                " once"
            )
        return source.replace(self.old, self.new)
