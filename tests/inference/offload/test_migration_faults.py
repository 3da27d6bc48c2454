"""Offloading with stores that are no longer this model's, too few slots, fetches that fail, Ctrl-C,
misuse."""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter

import pytest
import torch

from scmoe.inference.offload import migration, store
from scmoe.inference.offload.migration import WAYS, offload_experts
from scmoe.inference.offload.store import StoreError, write_store
from scmoe.moe.layout import Capacity
from tests.support.models import tiny, tiny_batch, tiny_model
from tests.support.offloading import DROPLESS, Failing, stored

pytestmark = [pytest.mark.faults, pytest.mark.inference, pytest.mark.representative]
IDS, _ = tiny_batch(tiny())


@pytest.fixture(autouse=True)
def no_thread_and_no_file_is_left():
    before = open_files()
    yield
    # what earlier tests left may be closed meanwhile
    assert not Counter(open_files()) - Counter(before)
    assert not [
        thread.name for thread in threading.enumerate() if thread.name.startswith("experts")
    ]


def open_files():
    places = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(place) for place in places if os.path.lexists(place))


def refused(model, path, message):
    with pytest.raises(StoreError, match=message) as error:
        offload_experts(copy.deepcopy(model), path)
    assert str(path) in str(error.value)


def test_a_store_that_is_missing_cut_changed_or_another_models_is_named(tmp_path):
    model, path = stored("position=pos2", tmp_path)
    refused(model, tmp_path / "none", "cannot be opened: No such file")
    _, other_path = stored("position=pos2", tmp_path, seed=1)
    refused(model, other_path, "belongs to a model with other weights")
    refused(
        tiny_model(tiny("model.ffn_dim=32", DROPLESS), torch.float32).eval(),
        path,
        "another model's experts",
    )
    refused(copy.deepcopy(model).double(), path, "another model's experts: .*F32.*F64")
    text, size = tmp_path / "text", path.stat().st_size
    text.write_text("no store")
    refused(model, text, "no store of experts")
    for length in (0, 7, 100, size // 2, size - 1):
        cut = tmp_path / "cut"
        shutil.copy(path, cut)
        os.truncate(cut, length)
        refused(model, cut, "it is cut|no store of experts")
    (tmp_path / "longer").write_bytes(path.read_bytes() + b"\0")
    refused(model, tmp_path / "longer", "something was added")


def test_any_flipped_bit_is_found(tmp_path):
    model, path = stored("position=pos2", tmp_path)
    whole, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [
        *range(0, 60, 7),
        *(draw.randrange(header) for _ in range(40)),
        header,
        len(whole) - 1,
    ]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        refused(model, path, ".")


def test_slots_that_are_too_few_or_too_many_are_refused_with_what_is_needed(tmp_path):
    model, path = stored("position=pos2 top_k=2", tmp_path)
    refusals = [
        ("determinate", 1, "slots is 1, allowed: 2 to 18"),
        ("speculative", 3, "slots is 3, allowed: 4 to 18"),
        ("blocking", 19, "slots is 19, allowed: 2 to 18"),
        ("resident", 2, "way is 'resident', allowed: blocking, determinate, speculative"),
    ]
    for way, slots, message in refusals:
        with pytest.raises(ValueError, match=message):
            offload_experts(model, path, way=way, slots=slots)


@pytest.mark.parametrize("way", WAYS)
def test_a_fetch_that_fails_ends_the_generation_with_the_experts_name(way, tmp_path, monkeypatch):
    monkeypatch.setattr(migration, "FileReader", Failing)
    model, path = stored("position=pos2", tmp_path)
    offload_experts(model, path, way=way)
    with pytest.raises(StoreError, match=r"expert \d of blocks\.\d\..*Input/output"):
        generate(model)
    with pytest.raises(RuntimeError, match="was closed"):
        generate(model)


def test_a_store_that_is_cut_during_the_generation_is_named(tmp_path):
    model, path = stored("position=pos2", tmp_path)
    offload_experts(model, path)
    generate(model)
    os.truncate(path, 4000)
    with pytest.raises(StoreError, match=rf"expert \d of blocks.*{path} ends at byte"):
        generate(model)


def generate(model):
    with torch.inference_mode():
        for i in range(4):
            model(IDS[:1, i : i + 1])


def test_ctrl_c_leaves_no_thread_and_no_file(tmp_path):
    """The reader is in the middle of an expert that takes 15 s at its rate."""
    model, path = stored("position=pos2", tmp_path)
    begin = time.monotonic()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt), offload_experts(model, path, rate_mb_s=2e-4):
            generate(model)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - begin < 10
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_ctrl_c_while_a_store_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    model, path = stored("position=pos2", tmp_path)
    before = path.read_bytes()

    def interrupted(shapes, read, partial, header):
        partial.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_in_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_store(path, model)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_offloading_cannot_honour_is_refused(tmp_path):
    model, path = stored("position=pos2", tmp_path)
    for rate in (0, -1.0):
        with pytest.raises(ValueError, match=r"rate_mb_s is .*above 0"):
            offload_experts(model, path, rate_mb_s=rate)
    with pytest.raises(ValueError, match="in training mode"):
        offload_experts(model.train(), path)
    model.eval().blocks[0].moe.rows = Capacity(2.0, filled=False)
    with pytest.raises(ValueError, match="computes empty slots too"):
        offload_experts(model, path)
    model.blocks[0].moe.rows = Capacity(2.0, filled=True)
    with offload_experts(model, path):
        with pytest.raises(RuntimeError, match="no gradients"):
            model(IDS)
        with pytest.raises(ValueError, match="no routed experts that are not offloaded yet"):
            offload_experts(model, path)
    dense = tiny_model(tiny("moe.architecture=dense"), torch.float32).eval()
    with pytest.raises(ValueError, match="no routed experts"):
        write_store(tmp_path / "dense", dense)
