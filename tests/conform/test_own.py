"""`scmoe.MoE` passes every question that it can be asked: in plain torch with each router and row
layout, and under the Strategy."""

import pytest

from experiments.engine.ranks import PRELOADED
from scmoe.conform.exam import FAILURES, PLACE_ALONE, Exam, pools_of
from scmoe.conform.questions import CHECKPOINT, QUESTION_NAMES
from tests.support.pages import ROOT

pytestmark = pytest.mark.ranks

EXAMPLES = ROOT / "docs/examples/conform"
UNASKED = {"LoRA on experts", "router bias", CHECKPOINT}
EQUAL = UNASKED | {"unequal tokens", "no tokens on a rank"}
OF_PLAIN = {  # layer: what it cannot be asked
    "make": UNASKED,
    "deepseek": {"LoRA on experts", CHECKPOINT, "balance loss"},
    "longcat": {"LoRA on experts", CHECKPOINT},
    "slots": EQUAL | {"padding takes no rows"},
    "filled": EQUAL,
    "buffers": EQUAL | {"padding takes no rows", "padding takes no capacity"},
}


QUICK = ("make", "longcat", "buffers")  # of `make test`


@pytest.fixture(scope="module")
def pools():
    pools = pools_of([PLACE_ALONE, "2", "4", "2x2"], PRELOADED)
    yield pools
    for pool in pools.values():
        pool.close()


def unasked(pools, source, places):
    """Return the questions that were not asked on some number of ranks; none may have failed."""
    exam = Exam(source, "float64", pools, places, QUESTION_NAMES, 60.0, lambda *_: None)
    answers = exam.run()
    assert [
        (name, answer)
        for name, of_places in answers.items()
        for answer in of_places.values()
        if answer.answer in FAILURES
    ] == []
    return {name for name in QUESTION_NAMES if answers[name][places[-1]].answer == "not asked"}


@pytest.mark.parametrize(
    "layer",
    [pytest.param(layer, marks=() if layer in QUICK else pytest.mark.faults) for layer in OF_PLAIN],
)
def test_in_plain_torch(layer, pools):
    assert unasked(pools, f"{EXAMPLES / 'own.py'}:{layer}", ("2",)) == OF_PLAIN[layer]


@pytest.mark.parametrize("dense", ["replicated", "sharded"])
def test_under_the_strategy(dense, pools):
    left_out = unasked(pools, f"{EXAMPLES / 'strategy.py'}:{dense}", ("2",))
    assert left_out == UNASKED - {CHECKPOINT}


@pytest.mark.faults
@pytest.mark.parametrize("layer", ["own.py:make", "strategy.py:replicated", "strategy.py:sharded"])
def test_on_each_number_of_ranks(layer, pools):
    unasked(pools, f"{EXAMPLES / layer}", (PLACE_ALONE, "2", "4", "2x2"))
