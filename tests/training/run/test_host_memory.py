"""Freed memory is kept for the next step."""

import os

import pytest

from scmoe.training.run.machine import keep_freed_memory
from tests.support.commands import ROOT
from tests.support.forked import python

FILL_TWICE = """
import resource, sys, torch
from scmoe.training.run.machine import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_a_second_step_touches_no_new_pages(tmp_path):
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt: freed memory goes back to the kernel")
    program = tmp_path / "program.py"
    program.write_text(FILL_TWICE)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def new_pages(*words: str) -> int:
        code, out, err = python(str(program), *words, cwd=tmp_path, env=env, timeout_s=60)
        assert code == 0, err
        return int(out)

    pages = (1 << 26) // os.sysconf("SC_PAGE_SIZE")
    assert new_pages("keep") < pages // 100 < pages // 2 < new_pages()
