"""Two batches in flight compute what one batch does, on one process: turns, halves, and the cache
of generation.

tests/distributed/test_two_batches.py does the same where rows travel between ranks.
"""

import pytest
import torch
from greenlet import getcurrent

from experiments.engine.profiles import peak_bytes
from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.sublayers import MLP, Residual, outermost
from scmoe.config.load import load
from scmoe.inference.generate import decode, prefill, stream
from scmoe.inference.sampling import GREEDY, Stopping
from scmoe.models import decoder
from scmoe.models.halves import in_flight
from scmoe.moe.balance import integer_sums
from scmoe.moe.stream import dropless
from scmoe.moe.turns import current_turns, in_turns, pass_turn
from tests.support.architectures import (
    BETWEEN_BLOCKS,
    EVERY_BLOCK,
    LATENT_ATTENTION,
    TABLES,
    overrides,
    with_marks,
)
from tests.support.models import assert_close, tiny, tiny_batch, tiny_model
from tests.support.two_batches import DROPLESS, EVEN, ROUTERS, EqualRows, assert_equal

LATENT = {name: text for name, text in LATENT_ATTENTION.items() if name != "latent-dense"}
LATENT = {name: f"{text} model.family=llama model.heads=4" for name, text in LATENT.items()}
LANGUAGE = TABLES | EVERY_BLOCK | BETWEEN_BLOCKS | LATENT
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


def test_a_capacity_counts_the_tokens_of_a_half():
    config = tiny("moe.capacity_factor=0.5", "moe.rows=filled")
    model = tiny_model(config)
    ids_BS, _ = tiny_batch(config, 2)
    halves = [model(ids_BS[:1]), model(ids_BS[1:])]
    model.batches_in_flight = 2
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
        model.batches_in_flight = batches[0]
        results.append(prefill(model, ids_BS, mask_BS, cache))
        for number, going in zip(batches[1:], ([True] * 3, [True, False, True]), strict=True):
            model.batches_in_flight = number
            results.append(decode(model, ids_BS[:, 0], going, cache)[going])
        return results

    with dropless(model), EqualRows():
        one = logits(1, 1, 1)
        for batches in ((2, 2, 2), (2, 1, 2), (1, 2, 1)):
            for actual, expected in zip(logits(*batches), one, strict=True):
                assert_close(actual, expected)


@pytest.mark.inference
def test_prefill_has_two_batches_in_flight_and_decode_one(monkeypatch):
    model = tiny_model(tiny(*DROPLESS)).eval()
    model.batches_in_flight = 2
    numbers = []

    def noted(batches, *args):
        numbers.append(batches)
        return in_flight(batches, *args)

    monkeypatch.setattr(decoder, "in_flight", noted)
    for _ in stream(model, [[1, 2], [3]], Stopping(3), GREEDY):
        assert model.batches_in_flight == 2, "between two steps the model is the caller's"
    assert numbers == [2, 1, 1]


@pytest.mark.parametrize("words", ["architecture=top_k", "architecture=shared_expert"])
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
        model.batches_in_flight = batches
        peaks.append(peak_bytes(torch.device("cpu"), step))
    assert 0 < peaks[2] <= 1.1 * peaks[1]


def test_images_of_both_halves():
    pytest.importorskip("timm", reason="needs the extra `vision`")
    pytest.importorskip("sklearn", reason="needs the extra `vision`")
    model = tiny_model(load(None, [*IMAGES, "moe.capacity_factor=null"]))
    shape_BCHW = (3, 3, 32, 32)
    images = torch.randn(
        shape_BCHW, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    mask_B = torch.tensor([True, True, False])
    outputs = []
    for batches in (1, 2):
        model.batches_in_flight = batches
        with EqualRows():
            outputs.append(model(images, mask_B))
    assert_close(outputs[1].logits_BC, outputs[0].logits_BC)
    assert torch.equal(integer_sums(outputs[0].stats), integer_sums(outputs[1].stats))


def test_compiled_sublayers_compute_both_halves():
    """The eager backend leaves out the code that another one would make; how a function is called
    is the same."""
    model = tiny_model(tiny(*DROPLESS, "moe.architecture=top_k"))
    ids_BS, _ = tiny_batch(tiny(), 3)
    expected = model(ids_BS).logits_BSV
    for part in outermost(model, (Residual, MLP)):
        part.compile(backend="eager")
    model.batches_in_flight = 2
    assert_close(model(ids_BS).logits_BSV, expected)


# ---------------------------------------------------------------------- turns


def test_functions_take_turns():
    order = []

    def function(name, waits):
        for step in range(waits):
            order.append(f"{name}{step}")
            pass_turn()
        assert current_turns().number == 2
        return name

    assert in_turns([lambda: function("a", 3), lambda: function("b", 1)]) == ["a", "b"]
    assert order == ["a0", "b0", "a1", "a2"]
    assert current_turns() is None
    pass_turn()  # it returns where there are no turns


def test_an_error_ends_all_functions():
    ended = []

    def waits():
        try:
            pass_turn()
            pass_turn()
        finally:
            ended.append(getcurrent())

    def fails():
        pass_turn()
        raise ValueError("the second batch")

    with pytest.raises(ValueError, match="the second batch"):
        in_turns([waits, fails, waits])
    assert len(ended) == 2
    assert all(batch.dead for batch in ended)


def test_modes_around_the_turns_hold_inside():
    seen = []

    def function():
        pass_turn()
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.no_grad(), torch.autocast("cpu"):
        in_turns([function, function])
    assert seen == [(False, True)] * 2
