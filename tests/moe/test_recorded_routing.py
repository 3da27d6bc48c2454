"""What is read of a recorded routing is what was written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from scmoe.moe.balance import load_max
from scmoe.moe.layout import count
from scmoe.moe.recorded_routing import Recorded, read_routing, shape_of, write_routing

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
RESULTS = Path(__file__).parents[2] / "docs" / "results"
KEPT_STEPS = [0, 10, 25, 50, 75, 100, 125, 150, 200, 250, 300, 349]


def routing(steps: list[int], num_experts: int = 4, seed: int = 0) -> Recorded:
    """Return two layers: one with 6 tokens that choose 2 experts, one with 3 tokens that choose
    one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((len(steps), 6, 2), (len(steps), 3, 1))
    ids = [
        torch.rand(*shape[:2], num_experts, generator=generator).topk(shape[2]).indices
        for shape in shapes
    ]
    return Recorded(steps, ids, num_experts, 3)


def assert_same(a: Recorded, b: Recorded) -> None:
    assert (a.steps, shape_of(a)) == (b.steps, shape_of(b))
    assert all(torch.equal(x, y) for x, y in zip(a.ids, b.ids, strict=True))


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "num_experts, dtype", ((4, "U8"), (255, "U8"), (256, "I16"), (32768, "I32"))
)
def test_a_file_holds_what_was_written_in_the_smallest_type(num_experts, dtype, tmp_path):
    written, path = routing([0, 7], num_experts), tmp_path / "some.safetensors"
    written.ids[0][0, 0, 0] = num_experts  # padding
    write_routing(written, path)
    assert_same(read_routing(path), written)
    assert f'"dtype": "{dtype}", "shape": [2, 6, 2]' in path.read_bytes().decode("latin-1")


def test_a_folder_is_read_as_one_file(tmp_path):
    files = {step: routing([step], seed=step) for step in (0, 5, 10)}
    for step, recorded in files.items():
        write_routing(recorded, tmp_path / f"step-{step:08}.safetensors")
    (tmp_path / ".tmp-1-step-00000015.safetensors").write_bytes(b"half")  # a killed run leaves it
    found = read_routing(tmp_path)
    together = [
        torch.cat(layer)
        for layer in zip(*(recorded.ids for recorded in files.values()), strict=True)
    ]
    assert_same(found, Recorded([0, 5, 10], together, 4, 3))


BROKEN = {
    "cut": (
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        r"is not a recorded routing: .*analysis\.record_routing=N",
    ),
    "text": (lambda path: path.write_text("step,layer"), "is not a recorded routing"),
    "absent": (Path.unlink, "is not a recorded routing"),
    "weights": (lambda path: save({"gate": torch.zeros(2)}, path), "is not a recorded routing"),
    "no layer_0": (
        lambda path: save(steps_and(layer_1=torch.zeros(2, 3, 1)), path),
        "is not a recorded routing",
    ),
    "too large": (
        lambda path: save(steps_and(layer_0=torch.full((2, 3, 1), 5)), path),
        "layer 0: .* from 0 to 4",
    ),
    "other steps": (
        lambda path: save(steps_and(layer_0=torch.zeros(3, 3, 1)), path),
        "layer 0: .*steps, tokens",
    ),
    "twice": (lambda path: write_routing(routing([3, 3]), path), r"\[3, 3\]"),
    "a folder of others": (
        lambda path: write_routing(routing([0], num_experts=8), path.with_name("a.safetensors")),
        "other layers, tokens, experts or ranks",
    ),
}


def steps_and(**layers: Tensor) -> dict[str, Tensor]:
    return {
        "steps": torch.tensor([0, 1]),
        **{name: ids.to(torch.uint8) for name, ids in layers.items()},
    }


def save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, {"num_experts": "4", "num_ranks": "1"})


@pytest.mark.parametrize("spoil, words", BROKEN.values(), ids=BROKEN)
def test_what_is_no_recorded_routing_is_refused_in_one_sentence(spoil, words, tmp_path):
    path = tmp_path / "own.safetensors"
    write_routing(routing([0, 7]), path)
    spoil(path)
    with pytest.raises(ValueError, match=words):
        read_routing(tmp_path if len([*tmp_path.iterdir()]) > 1 else path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no recorded routing\. Record one with"):
        read_routing(tmp_path)


# ---------------------------------------------------------------------- the kept recordings


def test_the_kept_recordings_are_those_of_the_report():
    report = json.loads((RESULTS / "routing.json").read_text())
    names = ("routing-quickstart", "routing-quickstart-top2", "routing-table3-top2")
    kept = {name: read_routing(FIGURES / f"{name}.safetensors") for name in names}
    for recorded in kept.values():
        assert (recorded.num_experts, recorded.steps) == (8, KEPT_STEPS)
    of_layers = kept["routing-quickstart"].ids
    for curves, ids_STK in zip(report["curves"], of_layers, strict=True):
        counts_SE = count(ids_STK.flatten(1), 8)
        for part, parts in (("experts", 8), ("EP 2", 2), ("EP 4", 4)):
            loads = [round(x, 2) for x in load_max(counts_SE, parts).tolist()]
            assert [curves[part][step] for step in KEPT_STEPS] == loads
