"""Each question catches what it claims: a layer with one mistake fails it, and as few others as
possible.

All layers are asked by the same two ranks. A question that looks at the same mistake from another
side is named beside the one that is meant.
"""

import pytest

from experiments.engine.ranks import PRELOADED
from scmoe.conform.exam import FAILURES, PLACE_ALONE, Exam, pools_of
from scmoe.conform.questions import QUESTION_NAMES
from tests.support.pages import ROOT
from tests.support.wrong_layers import WRONG

pytestmark = pytest.mark.ranks

PLACE = "2"
LAYERS = ROOT / "tests/support/wrong_layers.py"
ALSO = ("outputs", "expert gradients")  # asked of every layer


@pytest.fixture(scope="module")
def pools():
    pools = pools_of([PLACE_ALONE, PLACE], PRELOADED)
    yield pools
    for pool in pools.values():
        pool.close()


def ask(pools, name, questions, limit_s=60.0, places=(PLACE,)):
    exam = Exam(f"{LAYERS}:{name}", "float64", pools, places, questions, limit_s, lambda *_: None)
    return exam.run()


def test_a_right_layer_passes_every_question(pools):
    answers = ask(pools, "make", QUESTION_NAMES, places=(PLACE_ALONE, PLACE))
    assert {n: a[PLACE] for n, a in answers.items() if a[PLACE].answer != "passed"} == {}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_fails_its_question_and_no_other(mistake, pools):
    limit_s = 6.0 if "rank that is gone" in mistake or "empty" in mistake else 60.0
    answers = ask(pools, mistake, [*WRONG[mistake], *ALSO], limit_s)
    failed = {name for name, places in answers.items() if places[PLACE].answer in FAILURES}
    assert failed == {*WRONG[mistake]}


def test_every_question_has_a_mistake_that_fails_it():
    assert {name for names in WRONG.values() for name in names} == {*QUESTION_NAMES}
