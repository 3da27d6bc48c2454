"""Offloaded experts give the bits of resident ones, within their slots, whatever is fetched,
guessed or late."""

import copy
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scmoe.inference.offload import migration
from scmoe.inference.offload.cache import Cache, FileReader, PinnedCopies
from scmoe.inference.offload.migration import WAYS, Fetching, offload_experts
from scmoe.inference.offload.store import Store, expert_layers, write_store
from scmoe.moe.dispatcher import ChunkCounts
from scmoe.runs import trained
from tests.support.architectures import (
    BETWEEN_BLOCKS,
    EVERY_BLOCK,
    LATENT_ATTENTION,
    TABLES,
    with_marks,
)
from tests.support.cases import ROUTERS
from tests.support.exports import export
from tests.support.models import tiny, tiny_batch, tiny_model
from tests.support.offloading import DROPLESS, Late, stored

pytestmark = pytest.mark.inference
IDS, _ = tiny_batch(tiny())
# prefill with more active experts than slots, and single tokens
BATCHES = (IDS, IDS[:1, :1], IDS[:, :3])
FURTHER = {"noisy": "position=pos2 noisy=true", "swiglu": "position=pos1 model.family=llama"}
FURTHER |= {f"zero experts, {name}": words for name, words in ROUTERS.items()} | BETWEEN_BLOCKS
WITH_EXPERTS = {name: words for name, words in LATENT_ATTENTION.items() if name != "latent-dense"}
FURTHER |= {name: f"{words} model.family=llama" for name, words in WITH_EXPERTS.items()}
CASES = {**TABLES, **EVERY_BLOCK, **FURTHER}


def logits(model):
    with torch.inference_mode():
        return [model(ids).logits_BSV for ids in BATCHES]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [*with_marks([*TABLES, *EVERY_BLOCK]), *FURTHER])
def test_every_way_gives_the_bits_of_resident_experts(name, tmp_path):
    model, path = stored(CASES[name], tmp_path)
    expected = logits(model)
    for way in WAYS:
        for slots in (None, 6):
            offloaded = copy.deepcopy(model)
            with offload_experts(offloaded, path, way=way, slots=slots):
                assert equal(logits(offloaded), expected), (way, slots)
                assert not [
                    name for name, _ in offloaded.named_parameters() if "experts.w_" in name
                ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype_and_autocast_give_the_same_bits(dtype, tmp_path):
    model, path = stored("position=pos2 top_k=2", tmp_path, dtype)
    offloaded = copy.deepcopy(model)
    with (
        offload_experts(offloaded, path),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float64),
    ):
        assert equal(logits(offloaded), logits(model))


@pytest.mark.parametrize("right", [False, True])
def test_a_wrong_guess_is_never_used_and_a_right_one_is_a_hit(right, tmp_path, monkeypatch):
    model, path = stored("architecture=top_k top_k=2", tmp_path)
    expected, one = logits(model), IDS[:1, :1]
    with torch.inference_mode():
        needed = [set(stats.counts_E.nonzero().flatten().tolist()) for stats in model(one).stats]
    layers = list(expert_layers(model))

    def guess(layer, router, rows):
        own = needed[layers.index(layer)]
        return [(layer, e) for e in range(6) if (e in own) == right][:2]

    monkeypatch.setattr(migration, "guess", guess)
    with offload_experts(model, path, way="speculative") as cache:
        with torch.inference_mode():
            model(one)
        # nothing is guessed for the first of three layers
        assert cache.hit_rate == (4 / 6 if right else 0.0)
        assert equal(logits(model), expected)


@settings(max_examples=60)
@given(
    slots=st.integers(1, 5),
    ahead=st.integers(1, 5),
    calls=st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 17), min_size=1, max_size=6, unique=True)),
        max_size=25,
    ),
)
def test_the_cache_never_exceeds_its_slots_and_returns_the_right_expert(store, slots, ahead, calls):
    """Fetches are as late as possible, so an expert that is not waited for, or whose slot is given
    away, is wrong."""
    keys = list(store.places)
    cache = Cache(store, Late(store), slots, min(ahead, slots), torch.device("cpu"))
    places = sorted(slot.data_ptr() for slot in cache.unused)
    for is_guess, numbers in calls:
        wanted = [keys[i] for i in numbers]
        missing, started = (
            [key for key in wanted[: cache.ahead] if key not in cache.held],
            len(cache.source.queue),
        )
        if is_guess:
            cache.prefetch(wanted)
        else:
            assert equal(cache.weights(wanted), store.expected[wanted[0]])
        assert cache.held.keys() >= set(wanted[: cache.ahead])
        assert [key for key, _ in cache.source.queue[started:]] == missing
        used = [*cache.unused, *(held.slot for held in cache.held.values())]
        assert sorted(slot.data_ptr() for slot in used) == places


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a store, and the weights of its experts as `expected`."""
    model, path = stored("position=pos2", tmp_path_factory.mktemp("store"))
    store = Store(path, model)
    store.expected = {
        (layer, e): (own.w_in_eDF[e], own.w_out_eFD[e])
        for layer, own in expert_layers(model).items()
        for e in own.expert_ids
    }
    yield store
    store.close()


def test_the_least_recently_used_expert_goes(store):
    a, b, c, *_ = store.places
    cache = Cache(store, Late(store), 2, 2, torch.device("cpu"))
    for keys in ([a], [b], [a], [c]):
        cache.weights(keys)
    assert set(cache.held) == {a, c}


@pytest.mark.parametrize("way", ["blocking", "determinate"])
def test_fetching_begins_at_the_gate_and_only_blocking_waits_there(way, tmp_path, monkeypatch):
    """The backbone's first operator after the tap looks at what is held."""
    model, path = stored("position=pos2 top_k=2", tmp_path)
    seen = []
    with offload_experts(model, path, way=way) as cache:
        cache.source = Late(cache.store)
        model.blocks[0].sublayers[1].register_forward_hook(
            lambda *_: seen.append(
                (set(cache.held), [slot is None for _, slot in cache.source.queue])
            )
        )
        with torch.inference_mode():
            counts = model(IDS[:1, :1]).stats[0].counts_E
    layer, _ = next(iter(cache.store.places))
    needed = {(layer, e) for e in counts.nonzero().flatten().tolist()}
    ((held, arrived),) = seen
    if way == "determinate":
        assert held == needed and arrived == [False, False]
    else:
        assert held < needed and arrived == [True]


def test_a_rate_bounds_the_reader(store):
    key = next(iter(store.places))
    rate = store.num_bytes(key) / 1e6 / 0.05  # MB/s: 50 ms an expert
    reader, slot = FileReader(store, rate), torch.empty(store.num_bytes(key), dtype=torch.uint8)
    begin = time.perf_counter()
    reader.start(key, slot)()
    assert time.perf_counter() - begin >= 0.05
    reader.close()


def test_a_model_is_built_without_its_experts_in_memory(tmp_path, monkeypatch):
    """At most two layers' experts are alive at once while the store is written, and none is read
    afterwards."""
    config = tiny("model.layers=8", DROPLESS, "moe.position=pos2", "offload.way=determinate")
    whole = export(config, tmp_path / "model.safetensors").float().eval()
    source, path = tmp_path / "model.safetensors", tmp_path / "store.safetensors"
    alive, most, names = [], [], set()
    reader = trained.reader

    def counted(source, model):
        read = reader(source, model)

        def read_and_count(name):
            tensor = read(name)
            if ".experts." in name:
                names.add(name)
                alive.append(weakref.ref(tensor))
                most.append(sum(t.nbytes for ref in alive if (t := ref()) is not None))
            return tensor

        return read_and_count

    monkeypatch.setattr(trained, "reader", counted)
    trained.store_experts(config, source, path)
    # in float64
    layer = 2 * sum(p.nbytes for p in expert_layers(whole)["blocks.0.moe.experts"].parameters())
    assert len(names) == 8 and max(most) <= 2 * layer
    names.clear()
    model, cache = trained.load_offloaded(config, source, path)
    with cache:
        assert not names and not [name for name, p in model.named_parameters() if p.is_meta]
        assert model.head.weight is model.tokens.weight
        assert equal(logits(model), logits(whole))


def test_the_host_reads_the_counts_of_a_layer_once(store):
    """Each read waits for the device; the experts get what dispatch has read."""
    reads = []

    class OnDevice(torch.Tensor):
        def cpu(self):
            reads.append("dispatch")
            return self.as_subclass(torch.Tensor)

        def tolist(self):
            reads.append("again")
            return self.cpu().tolist()

    (layer, _), *_ = store.places
    fetching = Fetching(Cache(store, Late(store), 2, 2, torch.device("cpu")), layer)
    counts = ChunkCounts(3, torch.tensor([[2, 0, 1]]).as_subclass(OnDevice))
    _, receipt = fetching.dispatch(torch.zeros(3, 8), counts)
    assert receipt.num_tokens_per_expert_e.tolist() == [2, 0, 1] and reads == ["dispatch"]


def test_pinned_experts_are_on_the_host_whatever_the_default_device(store, monkeypatch):
    real, devices = torch.empty, set()

    def empty(num_bytes, dtype, pin_memory, device=None):
        devices.add(device)
        return real(num_bytes, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)  # without a GPU nothing can be pinned
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    pinned = PinnedCopies(store, torch.device("cpu")).pinned
    assert devices == {"cpu"}
    assert all(equal(store.weights(key, held), store.expected[key]) for key, held in pinned.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_every_way_gives_the_same_bits(tmp_path):
    """Resident experts there are computed by grouped products, which round otherwise."""
    pytest.importorskip("omegaconf", reason="not installed: omegaconf")
    model, path = stored("position=pos2 top_k=2", tmp_path)
    model, found = model.to("cuda"), []
    ids = IDS.to("cuda")
    with torch.inference_mode():
        expected = model(ids).logits_BSV
        for way in WAYS:
            offloaded = copy.deepcopy(model)
            with offload_experts(offloaded, path, way=way):
                found.append(offloaded(ids).logits_BSV)
    assert all(torch.equal(y, found[0]) for y in found)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3)  # products in TF32 at most


@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_needs_all_experts_of_the_model_has_every_way(way, tmp_path):
    words = ("model.layers=2", DROPLESS, "moe.num_experts=3", "moe.top_k=3")
    model, path = tiny_model(tiny(*words), torch.float32, 0).eval(), tmp_path / "store.safetensors"
    write_store(path, model)
    expected = logits(model)
    with offload_experts(model, path, way=way):
        assert equal(logits(model), expected)
