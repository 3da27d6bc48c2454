"""A mutant is a bug that was made before, here or elsewhere, with the tests that must catch it.

`python -m tests.mutation.mutate` applies each mutant alone in a copy of the tree. A mutant replaces text that occurs
exactly once in its file; tests/mutation/test_mutants.py fails when the text no longer does.
"""

from __future__ import annotations

from typing import NamedTuple

UNIT, DIST, FAULTS = "tests/unit", "tests/distributed", "tests/faults"
EP = f"{DIST}/test_negative_controls.py::test_with_nothing_broken_two_ranks_equal_one"  # all gradients
DP = f"{DIST}/test_strategy.py::test_a_run_resumed_in_another_layout_equals_an_uninterrupted_one[2-ep_sizes0]"
ORACLE = f"{UNIT}/test_reference_equality.py"
KILLED = f"{UNIT}/test_durable.py::test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint"
MOE, PARALLEL, DATA = "scmoe/moe", "scmoe/parallel", "datamodules"


class Mutant(NamedTuple):
    """A mutant is one replacement in one file.

    fault is its number in docs/faults.md, or 0 for a bug of the architecture. file is relative to the root. tests are
    pytest's node ids.
    """

    name: str
    fault: int
    file: str
    old: str = ""
    new: str = ""
    tests: tuple[str, ...] = ()

    def replaces(self, old: str, new: str) -> Mutant:
        return self._replace(old=old, new=new)

    def caught_by(self, *tests: str) -> Mutant:
        return self._replace(tests=tests)
