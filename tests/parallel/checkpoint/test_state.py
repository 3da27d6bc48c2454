"""What a checkpoint holds beside tensors is read back as it was, or refused before anything is
written. Generators of random numbers continue from their saved states, whose shapes never change.
"""

import enum
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.futures import Future

from scmoe.api import MoE
from scmoe.files import write_in_turn
from scmoe.parallel.checkpoint.loading import check_same_groups, check_state_of_experts
from scmoe.parallel.checkpoint.saving import _ShardWriter
from scmoe.parallel.checkpoint.state import (
    Stored,
    each_in_its_own_storage,
    from_json,
    rng_states,
    set_rng_states,
    split,
    to_text,
)
from scmoe.parallel.mesh import Mesh


class Colour(enum.Enum):
    RED = 1


def read_back(x):
    return json.loads(to_text(x), object_hook=from_json)


@pytest.mark.parametrize(
    "x",
    [
        {(1, 2): 3, ("a", (None, 0.5)): [1, {"b": True}]},
        {0: "zero", None: "none", 1.5: {(): "empty"}},
        {"__items__": 5, "__tuple__": {"__tensor__": 1}},
        {"pair": (1, ("a", [2])), "set": {1, (2, 3)}, frozenset(["b"]): {"__set__": frozenset()}},
    ],
)
def test_any_dictionary_is_read_back(x):
    assert read_back(x) == x


def test_tensors_and_paths_are_read_back():
    found = read_back({("k", 1): torch.tensor([1.5]), "path": Path("a/b"), "pair": (1, 2)})
    assert torch.equal(found[("k", 1)], torch.tensor([1.5]))
    assert (found["path"], found["pair"]) == ("a/b", (1, 2))


@pytest.mark.parametrize("x", [np.int64(1), Colour.RED, torch.float32, 1j])
def test_what_cannot_be_read_back_is_refused(x):
    with pytest.raises(TypeError, match="plain values"):
        to_text({"x": x})


def test_tensors_of_any_strides_and_of_two_names_can_be_saved():
    module, table = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last), torch.rand(4)
    module.transposed = nn.Parameter(torch.rand(2, 3).T)
    for name in ("one", "other"):
        module.register_buffer(name, table)
    moments = {"state": {"weight": {"exp_avg": module.weight.detach() + 1}}, "param_groups": []}
    checkpoint = {"state_dict": module.state_dict(), "optimizer_states": [moments]}
    tensors, _ = split(checkpoint, module, Mesh())
    read = load(save(dict(each_in_its_own_storage(tensors))))
    assert all(
        torch.equal(read[f"model.{name}"], tensor) for name, tensor in module.state_dict().items()
    )
    assert torch.equal(read["optimizer_0.weight.exp_avg"], module.weight + 1)


def test_one_full_file_holds_tensors_of_every_type(tmp_path):
    eighths = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    names = (
        "float64",
        "bfloat16",
        "bool",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "complex64",
        *eighths,
    )
    tensors = {name: torch.tensor([0, 1, 0]).to(getattr(torch, name)) for name in names}
    write_in_turn(tensors, tensors.__getitem__, tmp_path / "all.safetensors")
    read = load_file(tmp_path / "all.safetensors")
    assert {name: (t.dtype, t.to(torch.complex64).tolist()) for name, t in read.items()} == {
        name: (getattr(torch, name), [0, 1, 0]) for name in names
    }


def test_another_number_of_optimizers_or_groups_is_refused():
    """Lightning would drop the state of an optimizer in silence."""
    one, two = [{"params": ["a"]}], [{"params": ["a"]}, {"params": []}]
    check_same_groups(Path("x.ckpt"), [one, two], [one, two])
    with pytest.raises(ValueError, match="2 optimizers, and configure_optimizers made 1"):
        check_same_groups(Path("x.ckpt"), [one], [one, two])
    with pytest.raises(ValueError, match=r"2 parameter groups of optimizer 0.* no weight"):
        check_same_groups(Path("x.ckpt"), [one], [two])


def draw():
    return [
        torch.rand(3).tolist(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
    ]


# normals are drawn in pairs, and the generator keeps the second
@pytest.mark.parametrize("normals", [0, 1])
def test_restored_generators_draw_the_same_numbers(normals):
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    for _ in range(normals):
        draw()
    states = {name: state.clone() for name, state in rng_states().items()}
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    later = rng_states()
    for name, state in states.items():  # a reader of a checkpoint allocates by these shapes
        assert (state.shape, state.dtype) == (later[name].shape, later[name].dtype)
    set_rng_states(states)
    assert [draw() for _ in range(3)] == expected


def test_a_checkpoint_is_written_on_the_device_of_its_rank(tmp_path, monkeypatch):
    """It is written in a new thread, which begins on device 0."""
    of_thread, seen = threading.local(), []

    def write_data(*_):
        seen.append(torch.cuda.current_device())
        written = Future()
        written.set_result([])
        return written

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_data)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(of_thread, "device", 0))
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: setattr(of_thread, "device", device)
    )
    torch.cuda.set_device(3)
    writer = _ShardWriter(tmp_path)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(writer.write_data, None, None).result()
    assert seen == [3]


def test_state_of_all_experts_that_cannot_be_divided_is_refused():
    moe = MoE(16, 4, ffn_dim=32)
    number = {"0.experts.w_in_eDF": {"step": torch.ones(1), "history": [torch.ones(4)]}}
    for fits in ({}, number, {"0.router.gate.weight": {"row_var": torch.ones(4, 1)}}):
        check_state_of_experts(Path("x.ckpt"), moe, fits)
    for row_var in (torch.ones(4, 16, 1), Stored("rest.0")):
        with pytest.raises(ValueError, match="row_var of all experts"):
            check_state_of_experts(
                Path("x.ckpt"), moe, {"0.experts.w_in_eDF": {"row_var": row_var}}
            )
