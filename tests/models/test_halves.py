"""Two batches in flight compute what one batch does, on one process: turns, halves, and the cache
of generation.

tests/models/test_halves_ranks.py does the same where rows travel between ranks.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from experiments.engine.profiles import peak_bytes, read_events
from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.sublayers import MLP, Residual, outermost
from scmoe.config.load import load_config
from scmoe.inference.generate import decode, prefill, stream
from scmoe.inference.sampling import GREEDY, Stopping
from scmoe.models.run_as import schedule_of
from scmoe.moe.balance import integer_sums
from scmoe.moe.stream import dropless
from scmoe.runs.generate import how_passes_run
from scmoe.schedule.schedule import ModelSchedule
from tests.support.architectures import (
    BETWEEN_BLOCKS,
    EVERY_BLOCK,
    EVERY_FOURTH_BLOCK,
    LATENT_ATTENTION,
    TABLES,
    overrides,
    with_marks,
)
from tests.support.models import assert_close, tiny, tiny_batch, tiny_model
from tests.support.two_batches import DROPLESS, EVEN, ROUTERS, EqualRows, assert_equal, run_batches

LATENT = {name: text for name, text in LATENT_ATTENTION.items() if name != "latent-dense"}
LATENT = {name: f"{text} model.family=llama model.heads=4" for name, text in LATENT.items()}
LANGUAGE = TABLES | EVERY_BLOCK | EVERY_FOURTH_BLOCK | BETWEEN_BLOCKS | LATENT
del LANGUAGE["dgmoe-share"]  # two batches are refused with it
IMAGES = (
    *(
        "model.family=swin",
        "model.layers=2",
        "model.dim=8",
        "model.heads=1",
        "model.patch_size=2",
        "model.window=2",
    ),
    *("moe.num_experts=4", "data.name=digits", "data.image_size=32", "data.num_classes=5"),
)


def both_ways(config, batch_size):
    model = tiny_model(config)
    ids_BS, labels_BS = tiny_batch(config, batch_size)
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[-1, -3:] = False
    for mask in (None, mask_BS):
        assert_equal(model, ids_BS, labels_BS, mask)


@pytest.mark.parametrize("name", with_marks(LANGUAGE))
def test_outputs_are_bit_identical(name):
    both_ways(tiny(*DROPLESS, *overrides(LANGUAGE[name])), 3)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_outputs_are_bit_identical_with_every_router(name, batch_size):
    """Of one sequence the second half is empty."""
    both_ways(tiny(*DROPLESS, *overrides(ROUTERS[name])), batch_size)


def test_outputs_are_bit_identical_with_roomy_slots_and_recomputed_activations():
    words = (
        *EVEN,
        "moe.capacity_factor=8",
        "moe.rows=slots",
        "schedule.chunks=2",
        "trainer.recompute=true",
    )
    both_ways(tiny(*words), 4)


def test_an_empty_half_is_cut_in_chunks():
    both_ways(tiny(*DROPLESS, "schedule.chunks=3", "moe.architecture=top_k", "moe.top_k=2"), 1)


def test_a_capacity_counts_the_tokens_of_a_half():
    config = tiny("moe.capacity_factor=0.5", "moe.rows=filled")
    model = tiny_model(config)
    ids_BS, _ = tiny_batch(config, 2)
    halves = [model(ids_BS[:1]), model(ids_BS[1:])]
    run_batches(model, 2)
    whole = model(ids_BS)
    assert_close(whole.logits_BSV, torch.cat([half.logits_BSV for half in halves]))
    assert torch.equal(integer_sums(whole.stats), sum(integer_sums(half.stats) for half in halves))


@pytest.mark.inference
@pytest.mark.parametrize("name", ["pos2", "farskip", "longcat"])
def test_generation_keeps_one_cache_for_both_halves(name):
    """The number of batches changes between the passes, and texts have different lengths."""
    model = tiny_model(tiny(*overrides(LANGUAGE[name]))).eval()
    ids_BS = tiny_batch(tiny(), 3)[0][:, :6]
    mask_BS = torch.arange(6) < torch.tensor([[6], [3], [5]])

    def logits(*batches):
        cache, results = KVCache(3, 8), []
        run_batches(model, batches[0])
        results.append(prefill(model, ids_BS, mask_BS, cache))
        for number, going in zip(batches[1:], ([True] * 3, [True, False, True]), strict=True):
            run_batches(model, number)
            results.append(decode(model, ids_BS[:, 0], going, cache)[going])
        return results

    with dropless(model), EqualRows():
        one = logits(1, 1, 1)
        for batches in ((2, 2, 2), (2, 1, 2), (1, 2, 1)):
            for actual, expected in zip(logits(*batches), one, strict=True):
                assert_close(actual, expected)


def test_prefill_has_two_batches_in_flight_and_decode_one():
    model = tiny_model(tiny(*DROPLESS)).eval()
    run_batches(model, 2)
    numbers = []
    model.halves.register_forward_pre_hook(
        lambda halves, _: numbers.append(halves.batches_in_flight)
    )
    for _ in stream(model, [[1, 2], [3]], Stopping(3), GREEDY):
        assert schedule_of(model).batches_in_flight == 2, "between two steps it is the caller's"
    assert numbers == [2, 1, 1]


@pytest.mark.parametrize(
    "words",
    ["architecture=top_k", pytest.param("architecture=shared_expert", marks=pytest.mark.faults)],
)
def test_a_step_takes_at_most_a_tenth_more_memory(words):
    """Both halves' activations are those of one batch; a half's temporary tensors are smaller, and
    each weight has a gradient of the second half for a moment."""
    sizes = ("model.layers=8", "model.dim=64", "model.ffn_dim=256", "data.seq_len=64")
    config = tiny(f"moe.{words}", *DROPLESS, *sizes)
    model = tiny_model(config)
    ids_BS, _ = tiny_batch(config, 4)

    def step():
        model(ids_BS).logits_BSV.square().mean().backward()

    peaks = []
    for batches in (1, 1, 2):  # the first step makes the gradients
        run_batches(model, batches)
        peaks.append(peak_bytes(torch.device("cpu"), step))
    assert 0 < peaks[2] <= 1.1 * peaks[1]


@pytest.mark.parametrize("images_of_rank", [3, 1])
def test_images_of_both_halves(images_of_rank):
    """With one image the second half is empty."""
    pytest.importorskip("timm", reason="needs the extra `vision`")
    pytest.importorskip("sklearn", reason="needs the extra `vision`")
    model = tiny_model(load_config(None, [*IMAGES, "moe.capacity_factor=null"]))
    shape_BCHW = (images_of_rank, 3, 32, 32)
    images = torch.randn(
        shape_BCHW, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    mask_B = torch.arange(images_of_rank) < 2
    outputs = []
    for batches in (1, 2):
        run_batches(model, batches)
        with EqualRows():
            outputs.append(model(images, mask_B))
    assert_close(outputs[1].logits_BC, outputs[0].logits_BC)
    assert torch.equal(integer_sums(outputs[0].stats), integer_sums(outputs[1].stats))


@pytest.mark.faults  # both halves are compiled in tests/blocks/test_compiled_parts.py
def test_compiled_sublayers_compute_both_halves():
    """The eager backend leaves out the code that another one would make; how a function is called
    is the same."""
    model = tiny_model(tiny(*DROPLESS, "moe.architecture=top_k"))
    ids_BS, _ = tiny_batch(tiny(), 3)
    expected = model(ids_BS).logits_BSV
    for part in outermost(model, (Residual, MLP)):
        part.compile(backend="eager")
    run_batches(model, 2)
    assert_close(model(ids_BS).logits_BSV, expected)


# ---------------------------------------------------------------------- turns


def test_a_checkpoint_around_a_whole_block_is_refused_where_it_would_be_open_over_a_pause():
    model = tiny_model(tiny(*DROPLESS))
    ids_BS, _ = tiny_batch(tiny(), 2)
    expected = model(ids_BS).logits_BSV
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert_close(model(ids_BS).logits_BSV, expected)
    run_batches(model, 2)
    with pytest.raises(RuntimeError, match=r"checkpoint.*trainer\.recompute"):
        model(ids_BS)


# ---------------------------------------------------------------------- how a network is set


def test_other_numbers_than_one_and_two_are_refused():
    for number in (0, 3):
        with pytest.raises(ValueError, match=r"allowed: 1 \| 2"):
            ModelSchedule((), number)


def test_what_ran_names_two_batches():
    model = tiny_model(tiny(*DROPLESS))
    one = how_passes_run(model)["prefill"]
    run_batches(model, 2)
    assert how_passes_run(model)["prefill"] == f"{one}, two batches in flight"


# ---------------------------------------------------------------------- compiled and profiled


def graphs_of(model, ids_BS):
    """Return the logits of a model that is compiled as a whole, and the number of its graphs."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    logits_BSV = torch.compile(model, backend=counting)(ids_BS).logits_BSV
    return logits_BSV, len(graphs)


@pytest.mark.slow
def test_a_network_that_is_compiled_as_a_whole_has_graphs_inside_its_blocks():
    """With two batches in flight only what is before and after the blocks is compiled."""
    model = tiny_model(tiny(*DROPLESS, "moe.architecture=top_k"))
    ids_BS, _ = tiny_batch(tiny(), 3)
    expected = model(ids_BS).logits_BSV
    numbers = []
    for batches in (1, 2):
        run_batches(model, batches)
        logits_BSV, number = graphs_of(model, ids_BS)
        assert_close(logits_BSV, expected)
        numbers.append(number)
    assert numbers[0] > numbers[1] + len(model.blocks)


@pytest.mark.parametrize("words", ["architecture=scmoe", "architecture=dgmoe"])
def test_a_profile_has_every_operator_inside_one_turn_of_its_half(words):
    model = tiny_model(tiny(f"moe.{words}", *DROPLESS))
    run_batches(model, 2)
    ids_BS, _ = tiny_batch(tiny(), 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(ids_BS)
    ranges = [
        (event["name"].removeprefix("scmoe/"), event["ts"], event["ts"] + event["dur"])
        for event in read_events(profile)
        if event.get("cat") == "user_annotation" and event["name"].startswith("scmoe/")
    ]
    turns = [one for one in ranges if one[0].startswith("batch ")]
    others = [one for one in ranges if one not in turns]
    assert {name for name, *_ in turns} == {"batch 1", "batch 2"} and others
    for name, begin_us, end_us in others:
        around = [turn for turn in turns if turn[1] <= begin_us and end_us <= turn[2]]
        assert len(around) == 1, name
