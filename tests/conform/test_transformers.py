"""`hf:NAME` asks the implementations of the installed transformers, which are right in float32."""

import pytest

from experiments.engine.ranks import PRELOADED
from scmoe.conform.exam import FAILURES, Exam, pools_of
from scmoe.conform.questions import FIRST_QUESTIONS
from scmoe.conform.source import libraries_of

pytestmark = [pytest.mark.ranks, pytest.mark.peers, pytest.mark.faults]

PASS = [question.name for question in FIRST_QUESTIONS]


@pytest.fixture(scope="module")
def pools():
    pools = pools_of(["2"], [*PRELOADED, *libraries_of("hf:")])
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.mark.parametrize("name", ["all_to_all", "all_reduce"])
def test_an_implementation_is_right(name, pools):
    pytest.importorskip("transformers")
    exam = Exam(f"hf:{name}", "float32", pools, ["2"], PASS, 120.0, lambda *_: None)
    answers = exam.run()
    assert {name: of["2"].answer for name, of in answers.items()} == dict.fromkeys(PASS, "passed")


def test_a_name_that_is_not_registered_is_not_asked(pools):
    pytest.importorskip("transformers")
    exam = Exam("hf:nowhere", "float32", pools, ["2"], ["outputs"], 120.0, lambda *_: None)
    answer = exam.run()["outputs"]["2"]
    assert answer.answer not in FAILURES and "all_to_all" in answer.why
