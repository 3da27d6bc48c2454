"""Two batches in flight compute what one batch does, where rows travel between ranks.

On every rank one model runs a batch in one and in two parts: outputs are bit-identical, gradients
differ by the order of sums. Trainings with two batches through the real Strategy are compared with
one process that has one batch.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.engine.ranks import run_ranks
from scmoe.inference.generate import Passes, generate
from scmoe.inference.sampling import Stopping
from scmoe.parallel.dense.sharded import local, reshard
from scmoe.parallel.mesh import build_mesh
from scmoe.parallel.wire.all_to_all import Transfer
from scmoe.parallel.wire.announced import CeilingError
from scmoe.parallel.wire.wire import Wire
from scmoe.training.assembly.model import build_model
from tests.support.architectures import BETWEEN_BLOCKS, EVERY_BLOCK, LATENT_ATTENTION, SLOW, TABLES
from tests.support.cases import ARCHITECTURES as ON_RANKS
from tests.support.cases import BUFFERS, CLIPPED, EP2, QUICK, split
from tests.support.cases import ROUTERS as TRAINED_ROUTERS
from tests.support.comparison import assemble, assert_same
from tests.support.models import assert_close, tiny_batch
from tests.support.parts import split_wire
from tests.support.resuming import HALF, fit, largest_difference
from tests.support.trainings import randomise, tiny, train_cases
from tests.support.two_batches import EVEN, ROUTERS, assert_equal, run_batches

pytestmark = pytest.mark.ranks

TWO = "schedule.batches_in_flight=2"
LATENT = {
    name: f"{LATENT_ATTENTION[name]} model.family=llama model.heads=4"
    for name in ("longcat", "instella")
}
ROWS = {
    "chunks": "position=pos2 top_k=2 schedule.chunks=2",
    "slots": "position=pos2 capacity_factor=8 moe.rows=slots",
    "buffers": f"position=pos2 top_k=2 {BUFFERS}=4",  # with room for every row
    "narrow": "position=pos2 strategy.wire_dtype=bfloat16",
    "sequential": "position=pos2 schedule.transfers=sequential",
}
COMPARED = TABLES | EVERY_BLOCK | BETWEEN_BLOCKS | LATENT | ROUTERS | ROWS
del COMPARED["dgmoe-share"]  # two batches are refused with it
ON_FOUR = {
    name: COMPARED[name]
    for name in (
        *("top-2", "pos2", "farskip", "longcat router", "buffers"),
        "chunks",  # one of four ranks has one sequence, and so an empty half in chunks
        *sorted(SLOW),
    )
}


class Compared(NamedTuple):
    """differing: cases whose results differ, and how. transfers: of top-2, in the order of events
    on this rank: a start has the number of transfers in flight after it, a wait that before it;
    forward, then backward. collectives: of FSDP, in a pass without gradients and a step. twice: how
    the gradients of two forward passes before one backward differ where weights are split.
    in_chunks: as transfers, of two chunks in one batch, by schedule.transfers."""

    differing: dict[str, str]
    transfers: dict[int, list[list[tuple[str, int]]]]
    in_chunks: dict[str, list[list[tuple[str, int]]]]
    collectives: dict[int, Counter[str]]
    texts: dict[int, list[list[int]]]
    twice: str
    ceiling: str
    afterwards: bool


def model_of(text: str, wire: Wire) -> Any:
    words = f"{text} {' '.join(EVEN)} strategy.ep_size={wire.mesh.ep_size}"
    model = build_model(tiny(words, wire.mesh.world_size), wire)
    model.double()
    randomise(model)
    return model


def compare(
    rank: int, world_size: int, ep_sizes: tuple[int, ...], cases: dict[str, str]
) -> Compared:
    dist.init_process_group("gloo")
    differing = {}
    for ep_size in ep_sizes:
        wire = Wire(build_mesh(ep_size, torch.device("cpu"), timedelta(seconds=60)))
        for name, text in cases.items():
            if ep_size == 1 and ("wire_dtype" in text or "transfers" in text):
                continue
            # Ranks have other numbers of sequences, where rows do not need equal ones
            batch_size = 3 if name in ("slots", "buffers") else 1 + (rank + 1) % 3
            ids_BS, labels_BS = tiny_batch(tiny(" ".join(EVEN)), batch_size)
            mask_BS = None
            if rank == 0:
                mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
                mask_BS[-1, -5:] = False
            try:
                assert_equal(model_of(text, wire), ids_BS.roll(rank), labels_BS, mask_BS)
            except AssertionError as error:
                differing[f"{name}, EP {ep_size}"] = str(error)
    transfers = {
        batches: events_of(model_of("architecture=top_k top_k=2", wire), batches)
        for batches in (1, 2)
    }
    two_chunks = "position=pos2 schedule.chunks=2 schedule.transfers"
    in_chunks = {
        way: events_of(model_of(f"{two_chunks}={way}", wire), 1)
        for way in ("overlapped", "sequential")
    }
    texts = {batches: written(wire, batches) for batches in (1, 2)}
    collectives = {batches: collectives_of(batches) for batches in (1, 2)}
    twice = twice_before_backward()
    return Compared(differing, transfers, in_chunks, collectives, texts, twice, *ceiling_of(wire))


def events_of(model: Any, batches: int) -> list[list[tuple[str, int]]]:
    launch, finish, events, in_flight = Transfer.launch, Transfer.finish, [], set()

    def launched(transfer: Transfer, rows: Tensor, backward: bool) -> Tensor:
        in_flight.add(transfer)
        events.append(("start", len(in_flight)))
        return launch(transfer, rows, backward)

    def finished(transfer: Transfer) -> None:
        events.append(("wait", len(in_flight)))
        in_flight.remove(transfer)
        finish(transfer)

    run_batches(model, batches)
    with patch.object(Transfer, "launch", launched), patch.object(Transfer, "finish", finished):
        loss = model(tiny_batch(tiny(" ".join(EVEN)), 2)[0]).logits_BSV.square().sum()
        forward = [*events]
        loss.backward()
    return [forward, events[len(forward) :]]


def collectives_of(batches: int) -> Counter[str]:
    calls: Counter[str] = Counter()

    def counted(kind: str) -> Any:
        original = getattr(dist, kind)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[kind] += 1
            return original(*args, **kwargs)

        return patch.object(dist, kind, call)

    text = (  # whose numbers are not gathered
        "position=pos2 model.layers=4 capacity_factor=8 moe.rows=slots"
    )
    model = model_of(text, split_wire(dist.get_world_size()))
    run_batches(model, batches)
    ids_BS, _ = tiny_batch(tiny(" ".join(EVEN)), 2)
    with counted("all_gather_single"), counted("reduce_scatter_single"):
        with torch.no_grad():
            model(ids_BS)
        reshard(model)
        model(ids_BS).logits_BSV.square().sum().backward()
    return calls


def twice_before_backward() -> str:
    """Return "" if the gradients are those of one batch in flight, where two passes run before
    backward, which goes through the second one first or, for two calls, through the first one."""
    model = model_of("position=pos2 capacity_factor=8", split_wire(dist.get_world_size()))
    batches_of_ids = [tiny_batch(tiny(" ".join(EVEN)), 2)[0].roll(shift) for shift in (0, 1)]
    for together in (True, False):
        grads = []
        for batches in (1, 2):
            run_batches(model, batches)
            model.zero_grad()
            with torch.no_grad():
                model(batches_of_ids[0])
            model(batches_of_ids[1])  # its backward never runs
            losses = [model(ids).logits_BSV.square().sum() for ids in batches_of_ids]
            for loss in [sum(losses)] if together else losses:
                loss.backward()
            grads.append({n: local(p.grad).clone() for n, p in model.named_parameters()})
        for name, gradient in grads[0].items():
            try:
                assert_close(grads[1][name], gradient, what=name)
            except AssertionError as error:
                return str(error)
    return ""


def written(wire: Wire, batches: int) -> list[list[int]]:
    """Return the texts of this rank: the last one has a single text, the others have several of
    other lengths."""
    model = model_of("position=pos2 capacity_factor=1", wire).eval()
    run_batches(model, batches)
    is_last = wire.mesh.rank == wire.mesh.world_size - 1
    prompts = [[1, 2, 3, 4], [5], [6, 7, 8]][: 1 if is_last else 3]
    passes = Passes(wire.mesh.true_on_all_ranks, piece=2)
    return [text.ids for text in generate(model, prompts, Stopping(max_tokens=5), passes=passes)]


def ceiling_of(wire: Wire) -> tuple[str, bool]:
    """Return the error of a batch that one half ends, and whether the model computes the same
    afterwards."""
    model = model_of("position=pos2 moe.dropless_ceiling=1", wire)
    ids_BS, _ = tiny_batch(tiny(" ".join(EVEN)), 2)
    run_batches(model, 2)
    try:
        model(ids_BS)
    except CeilingError as error:
        found = f"{type(error.__context__).__name__}"
    for block in model.blocks:
        block.moe.dispatcher.ceiling = None
    before = model(ids_BS).logits_BSV
    run_batches(model, 1)
    return found, torch.allclose(before, model(ids_BS).logits_BSV, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def two() -> list[Compared]:
    """Without an exchange of rows tests/models/test_halves.py compares them."""
    quick = {name: text for name, text in COMPARED.items() if name not in SLOW}
    return run_ranks(compare, 2, (2,), quick, timeout_s=250)


@pytest.fixture(scope="module")
def four() -> list[Compared]:
    return run_ranks(compare, 4, (1, 2, 4), ON_FOUR, timeout_s=250)


RANKS = ["two", pytest.param("four", marks=pytest.mark.faults)]


@pytest.mark.parametrize("ranks", RANKS)
def test_outputs_are_bit_identical_and_gradients_equal(ranks, request):
    for rank in request.getfixturevalue(ranks):
        assert rank.differing == {}


def test_the_rows_of_one_half_travel_while_the_other_computes(two):
    """Only the last wait of forward and that of backward find no other transfer in flight."""
    for rank in two:
        for one, both in zip(rank.transfers[1], rank.transfers[2], strict=True):
            assert all(number == 1 for _, number in one)
            waits = [number for event, number in both if event == "wait"]
            assert len(waits) == len(one)  # twice as many transfers
            assert waits[:-1] == [2] * (len(waits) - 1) and waits[-1] == 1


def test_sequential_transfers_are_waited_for_one_by_one(two):
    for rank in two:
        most = {
            way: max(number for events in both for _, number in events)
            for way, both in rank.in_chunks.items()
        }
        assert most == {"overlapped": 2, "sequential": 1}


def test_split_weights_are_gathered_and_summed_once_for_both_halves(two):
    for rank in two:
        assert rank.collectives[2] == rank.collectives[1] != Counter()


def test_two_passes_before_one_backward_have_the_gradients_of_one_batch(two):
    assert [rank.twice for rank in two] == ["", ""]


@pytest.mark.parametrize("ranks", RANKS)
def test_texts_are_those_of_one_batch(ranks, request):
    for rank in request.getfixturevalue(ranks):
        assert rank.texts[2] == rank.texts[1]


def test_an_error_in_one_half_is_raised_once(two):
    """What it interrupts is the turn of the other half, so it has no other error as its context."""
    for rank in two:
        assert rank.ceiling == "NoneType"
        assert rank.afterwards


# ---------------------------------------------------------------------- trainings

# Those of `make test` route or send differently. Gradients of every architecture on ranks, in one
# batch and in two, are compared above; the fault suite trains the others too.
KINDS = ("top-2", "pos2", "dgmoe", "pos2-every-block", "longcat", "farskip")
ONE_STEP = {
    name: f"{ON_RANKS[name]} trainer.max_steps=1" for name in QUICK if "dgmoe-share" not in name
}
TRAINED = {name: ONE_STEP[name] for name in KINDS} | TRAINED_ROUTERS
TRAINED["deepseek"] += " data.global_batch_size=16"  # two sequences a rank and batch
TRAINED |= {
    "clipped": f"position=pos2 top_k=2 {CLIPPED} data.global_batch_size=16",
    "three steps": "position=pos2",
}
HOW = {  # case: further words on ranks
    "clipped": "trainer.recompute=true",
    "three steps": f"{BUFFERS}=2 moe.overflow=refuse schedule.chunks=2",
}
SPLIT = {
    "clipped": f"trainer.recompute=true {split('sharded', 2, 4)}",
    "deepseek": split("sharded", 2, 4),
}
SPLIT_TOO = {  # in the fault suite
    "pos2": split("hybrid", 4, 4),
    "dgmoe": split("sharded", 4, 4),
    "longcat": split("sharded", 2, 4),
    "farskip": split("sharded", 2, 4),
}


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    return run_ranks(train_cases, 1, TRAINED, timeout_s=280)[0]


def assert_trained(one: dict[str, Any], ranks: int, cases: dict[str, str]) -> None:
    records = run_ranks(
        train_cases, ranks, {name: f"{text} {TWO}" for name, text in cases.items()}, timeout_s=280
    )
    for name in cases:
        assert_same([record[name] for record in records], assemble([one[name]]))


def test_two_ranks_train_as_one_process_with_one_batch(one):
    assert_trained(
        one, 2, {name: f"{text} {EP2} {HOW.get(name, '')}" for name, text in TRAINED.items()}
    )


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SPLIT, id="quick"),
        pytest.param(SPLIT_TOO, id="others", marks=pytest.mark.faults),
    ],
)
def test_four_ranks_with_split_weights_train_as_one_process(one, cases):
    assert_trained(one, 4, {name: f"{TRAINED[name]} {how}" for name, how in cases.items()})


@pytest.mark.faults
def test_two_ranks_train_every_other_architecture_as_one_process():
    others = {name: text for name, text in ONE_STEP.items() if name not in KINDS}
    (one,) = run_ranks(train_cases, 1, others)
    assert_trained(one, 2, {name: f"{text} {EP2}" for name, text in others.items()})


def uninterrupted_and_resumed(rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    config = tiny(
        f"position=pos2 trainer.max_steps=6 model.dropout=0.1 moe.noisy=true {EP2} {TWO}",
        world_size,
    )
    uninterrupted = fit(config, folder)
    return [uninterrupted, fit(config, checkpoint=folder / f"step={HALF}.ckpt")]


def test_a_resumed_run_is_bit_identical(tmp_path):
    ranks = run_ranks(uninterrupted_and_resumed, 2, tmp_path)
    assert largest_difference([rank[0] for rank in ranks], [rank[1] for rank in ranks])[0] == 0
