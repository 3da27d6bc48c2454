"""With fixed capacity a whole training step stays on its device: no tensor is elsewhere, no dtypes
are mixed, and the host waits once, for the guard. The steps run on fake tensors of `cuda`, without
a GPU (docs/tests.md).
"""

import pytest

from tests.support import fake_cuda
from tests.support.broken_steps import FAULTS
from tests.support.fake_steps import StepError, attempt

pytestmark = pytest.mark.fake_cuda

ARCHITECTURES = {  # words, and how often one step routes and sends
    "dense": ("architecture=dense", 0),
    "top_k": ("architecture=top_k top_k=2", 1),
    "shared_expert": ("architecture=shared_expert top_k=2", 1),
    "pos1": ("position=pos1 combine=direct_add", 1),
    "pos2": ("position=pos2 combine=cg1", 1),
    "pos3": ("position=pos3 combine=cg2 top_k=2", 1),
    "dgmoe": ("architecture=dgmoe position=pos2", 2),
    "dgmoe_share": ("architecture=dgmoe_share position=pos2 model.layers=4", 4),
}
PRECISIONS, RECOMPUTE, RANKS, CHUNKS = ("32-true", "bf16-mixed"), ("false", "true"), (1, 4), (1, 2)
OF_SWIN = ("pos2",)  # in `make test`: Swin takes longest
ONE_RANK = ("dense", "top_k")
BOTH = ("pos2", "dgmoe")  # in both precisions of GPT in `make test`


def cases():
    """Return every architecture of GPT in both precisions, of LLaMA in one, and of Swin in the
    other. Each architecture meets every pair of the choices, but precision and ranks only together
    with its neighbour.

    In `make test` LLaMA has every architecture, and GPT those of ONE_RANK on one rank, in either
    precision, and those of BOTH, which meet every choice.
    """
    found = []
    for i, (name, (words, streams)) in enumerate(ARCHITECTURES.items()):
        for family, f, p in [
            ("gpt", 0, 0),
            ("gpt", 0, 1),
            ("llama", 1, 1 - i % 2),
            ("swin", 1, i % 2),
        ]:
            recompute, ranks, chunks = (
                RECOMPUTE[(f + i) % 2],
                RANKS[(p + i) % 2],
                CHUNKS[(f + p) % 2],
            )
            all_words = (
                f"{family} {words} trainer.precision={PRECISIONS[p]} trainer.recompute={recompute}"
            )
            if streams:
                all_words += f" schedule.chunks={chunks}"
            runs = streams + (family == "swin" and streams > 0)  # stage 4 of Swin is top-2
            # dispatch and combine, and the way back of both gradients
            sent = 4 * chunks * runs if ranks > 1 else 0
            quick = (
                name in OF_SWIN
                if family == "swin"
                else family == "llama" or name in BOTH or (name in ONE_RANK and p == i % 2)
            )
            marks = () if quick else pytest.mark.faults
            found.append(
                pytest.param(
                    all_words, ranks, sent, id=f"{family}-{name}-{PRECISIONS[p]}", marks=marks
                )
            )
    return found


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Yield a function that calls `attempt` in a process with the shim."""
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    with fake_cuda.process_with(fake_cuda.build(tmp_path_factory.mktemp("shim"))) as process:
        yield lambda *case: process.submit(attempt, *case).result()


@pytest.mark.parametrize(("words", "ranks", "sent"), cases())
def test_a_training_step_stays_on_its_device(device, record_property, words, ranks, sent):
    done = device(words, ranks)
    assert done.steps == (1 if words.startswith("swin") else 2)
    assert done.reads == done.steps, "the guard reads one number a step"
    assert done.exchanges == sent * done.steps
    assert done.graphs == 0
    record_property("fake_cuda_steps", done.steps)


@pytest.mark.parametrize(
    ("words", "graphs"),
    [
        ("gpt position=pos2 trainer.precision=bf16-mixed", 3),  # attention, MLP, shared expert
        pytest.param(
            "llama architecture=dgmoe position=pos2 trainer.recompute=true",
            2,
            marks=pytest.mark.faults,
        ),
        # attention that adds to its own input, in the first block, and to another one; shared
        # expert
        pytest.param("gpt architecture=farskip every=1 top_k=2", 3, marks=pytest.mark.faults),
        # 3 kinds at 4 widths, attention with and without shift, except where the window is the
        # whole map
        pytest.param(
            "swin architecture=shared_expert trainer.precision=bf16-mixed",
            15,
            marks=pytest.mark.faults,
        ),
    ],
)
def test_a_compiled_step_has_no_graph_break(device, record_property, words, graphs):
    done = device(f"{words} trainer.compile=true", 4)
    assert done.graph_breaks == 0 and done.reads == done.steps > 0
    assert done.graphs == graphs
    record_property("fake_cuda_steps", done.steps)


@pytest.mark.parametrize(
    ("slot", "chunks"),
    [
        (3, 2),
        *(
            pytest.param(*at, marks=pytest.mark.faults)
            for at in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1))
        ),
    ],
)
def test_two_communicators_carry_rows_and_gradients_in_one_order_on_all_ranks(
    device, record_property, slot, chunks
):
    """The device runs what the host launches, so the host's order is the order of both
    communicators together.

    tests/parallel/wire/test_orders.py has the orders of gloo, where a thread paces the
    gradients."""
    words = f"gpt position=pos2 schedule.slot={slot} schedule.chunks={chunks} trainer.max_steps=1"
    first, second = (device(words, 4, None, rank).order for rank in (0, 1))
    assert first == second
    communicators = [group for _, group, _ in first]
    assert set(communicators) == {"ep", "edp", "all"}, first
    assert communicators.count("ep") == 4 * chunks and communicators.count("edp") >= 1
    record_property("fake_cuda_steps", 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_step_is_detected(device, fault):
    with pytest.raises(StepError, match=FAULTS[fault][1]):
        device("gpt position=pos2 trainer.precision=bf16-mixed", 4, fault)
