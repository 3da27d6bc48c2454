"""Runs with split dense weights: resumed in other layouts, in half precision, compiled, and with a
user's own module.

One start of four ranks does all of them. A resumed run is within 1e-12 of one process, in float64
under AdamW.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from experiments.engine.ranks import run_ranks
from scmoe.api import ScMoEBlock
from scmoe.blocks.moe_block import MoEBlock
from scmoe.lightning import strategy
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.moe.recorder import Recorder
from scmoe.moe.router import Router
from scmoe.parallel.mesh import expert_parameters
from tests.support.cases import split
from tests.support.comparison import TOLERANCE
from tests.support.resuming import HALF, fit, largest_difference
from tests.support.trainings import RecordingModel, be_on_nodes, tiny, train, users_trainer, whole

pytestmark = pytest.mark.ranks

MODEL = "position=pos2 top_k=2 optim.lr=0.01 optim.warmup_steps=2 trainer.max_steps=6"
LAYOUTS = {"hybrid, EP 1": split("hybrid", 1, 4), "replicated, EP 4": "strategy.ep_size=4"}
PRECISIONS = {
    "fp32": "trainer.precision=32-true",
    "bf16": "trainer.precision=bf16-mixed",
    "bf16 weights": "trainer.precision=bf16-true",
    "compiled": "trainer.precision=32-true",
}


def resumed_in_layouts(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Return a run with sharded weights, whose checkpoint is written in parallel, and run that
    continue from it."""
    first = f"{MODEL} strategy.async_checkpoint=true {split('sharded', 2, 4)}"
    runs = {"uninterrupted": fit(tiny(first, 4), folder)}
    for name, text in LAYOUTS.items():
        config = tiny(f"{MODEL} {text}", 4)
        be_on_nodes(rank, config.trainer.devices)
        runs[name] = fit(config, None, folder / f"step={HALF}.ckpt")
    be_on_nodes(rank, 4)
    return runs


# -------------------------------------------------- precision, and when FSDP communicates


class Watched(RecordingModel):
    """Notes the types of gathered weights and of the residual stream, and when FSDP's collectives
    start in and around MoE streams."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.gathered: dict[str, torch.dtype] = {}
        self.collectives: list[float] = []
        self.begun: list[int] = []
        self.recorders = []
        for block in self.model.modules():
            if isinstance(block, MoEBlock):
                self.recorders.append(Recorder(torch.device("cpu")))
                block.run_as(block.schedule, block.moe.dispatcher, self.recorders[-1])
            if isinstance(block, Router):
                block.register_forward_pre_hook(
                    lambda router, _: self.note("gate", router.gate.weight)
                )
        embedding = next(m for m in self.model.modules() if isinstance(m, nn.Embedding))
        embedding.register_forward_pre_hook(lambda *_: self.begun.append(len(self.collectives)))
        attention = self.model.blocks[0].sublayers[0]
        attention.register_forward_pre_hook(
            lambda sublayer, _: self.note("matrix", sublayer.f.qkv.weight)
        )
        attention.register_forward_pre_hook(lambda _, inputs: self.note("stream", inputs[0]))

    def note(self, name: str, tensor: Tensor) -> None:
        assert not isinstance(tensor, DTensor)
        self.gathered[name] = tensor.dtype

    def while_open(self) -> list[float]:
        """Return when collectives of FSDP started while a block's stream was open: from dispatch
        to decode, and in backward from decode to encode."""
        found = []
        for marks in (recorder.marks for recorder in self.recorders):
            for direction, first, begins, last in (
                ("forward", "dispatch", True, "decode"),
                ("backward", "decode", False, "encode"),
            ):
                own = [mark for mark in marks if mark.direction == direction]
                opened = [
                    mark.time for mark in own if mark.operator == first and mark.begins == begins
                ]
                closed = [mark.time for mark in own if mark.operator == last and mark.begins]
                assert len(opened) == len(closed) >= 3
                for a, b in zip(opened, closed, strict=True):
                    assert a < b
                    found += [t for t in self.collectives if a < t < b]
        return found


def in_precisions(rank: int, world_size: int, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        config = tiny(f"position=pos2 {PRECISIONS[name]} {split('sharded', 2, 4)}", 4)
        module = Watched(config, compiled=name == "compiled")
        originals = {
            kind: getattr(dist, kind) for kind in ("all_gather_single", "reduce_scatter_single")
        }

        def noted(
            kind: str, module: Watched = module, originals: dict[str, Any] = originals
        ) -> Any:
            def collective(*args: Any, **kwargs: Any) -> Any:
                if getattr(kwargs.get("group"), "group_desc", None) != "counts":  # FSDP's own
                    module.collectives.append(time.perf_counter())
                return originals[kind](*args, **kwargs)

            return collective

        with patch.multiple(dist, **{kind: noted(kind) for kind in originals}):
            logged = train(config, module)["logged"]
        found[name] = {"loss": logged["train/loss"], "gathered": module.gathered}
        found[name] |= {"collectives": len(module.collectives), "while open": module.while_open()}
        found[name]["begun"] = module.begun
    return found


# ---------------------------------------------------------------------- a user's own module


class Own(LightningModule):
    """Knows nothing of split weights: embedding, blocks, a part outside the blocks, and a head that
    is tied."""

    def configure_model(self) -> None:
        if not hasattr(self, "blocks"):
            group = self.wire.mesh.ep_group
            self.tokens = nn.Embedding(32, 16)
            blocks = [
                ScMoEBlock(16, 2, num_experts=4, position="pos1", ffn_dim=16, group=group)
                for _ in range(2)
            ]
            self.blocks = nn.ModuleList(blocks)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 32, bias=False)
            self.head.weight = self.tokens.weight

    def loss(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids[:, :-1])
        for block in self.blocks:
            x, _ = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", self.loss(batch[0]), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test", self.loss(batch[0]), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def own_module(rank: int, dense: str, folder: Path) -> dict[str, Any]:
    """Fit, validate, test, predict, save and fit again. Return every value of that and the
    weights."""
    torch.manual_seed(1)
    ids = torch.randint(32, (16, 9), generator=torch.Generator().manual_seed(2))
    sampler = DistributedSampler(TensorDataset(ids), 2, rank, shuffle=False)
    loader = DataLoader(
        TensorDataset(ids), batch_size=4, sampler=sampler, generator=torch.Generator()
    )

    def trainer(steps: int) -> Any:
        saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=1)
        how = {"precision": "64-true", "gradient_clip_val": 0.1, "use_distributed_sampler": False}
        strategy = ExpertParallelStrategy(ep_size=1, dense=dense)
        return users_trainer(
            2, strategy, max_steps=steps, callbacks=[saves], enable_checkpointing=True, **how
        )

    module, first = Own(), trainer(2)
    first.fit(module, loader, loader)
    found = {"split": isinstance(module.tokens.weight, DTensor)}
    values = [
        first.validate(module, loader, verbose=False)[0]["val"],
        *first.predict(module, loader),
    ]
    first.save_checkpoint(folder / "after.ckpt")  # after a forward without backward
    second = trainer(4)
    second.fit(module, loader, loader, ckpt_path=folder / "after.ckpt", weights_only=True)
    values.append(second.test(module, loader, verbose=False)[0]["test"])
    fresh = Own()
    values.append(
        trainer(4).validate(fresh, loader, ckpt_path=folder / "after.ckpt", verbose=False)[0]["val"]
    )
    torch.manual_seed(rank)
    again = Own()  # its experts are drawn different on each rank
    trainer(1).fit(again, loader)
    found["experts of a second fit"] = [whole(p) for _, p in expert_parameters(again)]
    found["inference mode"] = first.validate_loop.inference_mode
    second.strategy.lightning_module_state_dict()  # lets every weight be split again
    weights = {name: whole(p) for name, p in module.named_parameters()}
    return found | {"values": torch.tensor([float(v) for v in values]), "weights": weights}


# ---------------------------------------------------------------------- tests


def on_four(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    return {
        "layouts": resumed_in_layouts(rank, folder),
        "precisions": in_precisions(rank, 4, ("bf16",)),
    }


def on_two(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """With a byte of memory, auto takes the last way, sharded, once the module has its weights."""
    with patch.object(strategy, "memory_of_rank", lambda *_: 1.0):
        return {dense: own_module(rank, dense, folder / dense) for dense in ("replicated", "auto")}


def on_one(rank: int, world_size: int) -> tuple[dict[str, Any], list[Tensor]]:
    return (
        fit(tiny(MODEL)),
        train(tiny("position=pos2 trainer.precision=32-true"))["logged"]["train/loss"],
    )


@pytest.fixture(scope="module")
def one() -> tuple[dict[str, Any], list[Tensor]]:
    return run_ranks(on_one, 1)[0]


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(on_four, 4, tmp_path_factory.mktemp("runs"), timeout_s=600)


def test_a_run_resumed_in_any_layout_equals_one_process(one, four):
    for name in four[0]["layouts"]:
        error, where = largest_difference([rank["layouts"][name] for rank in four], [one[0]])
        assert error <= TOLERANCE, f"{name}: {where}"


def test_fsdp_starts_no_collective_inside_an_open_stream(four):
    for rank in four:
        assert rank["precisions"]["bf16"]["collectives"] >= 3 * 2 * 2
        assert rank["precisions"]["bf16"]["while open"] == []


def test_weights_are_gathered_while_the_unit_before_computes(four):
    """A gather is of one type and group: two for what is outside the blocks, which computes first,
    three for a pair."""
    for rank in four:
        assert rank["precisions"]["bf16"]["begun"][0] == 2 + 3


def test_under_bf16_mixed_matrices_are_gathered_in_bfloat16_and_gates_in_float32(four):
    for rank in four:
        types = rank["precisions"]["bf16"]["gathered"]
        assert types == {"gate": torch.float32, "matrix": torch.bfloat16, "stream": torch.float32}


def assert_near(
    ranks: list[dict[str, Any]], name: str, losses: list[Tensor], tolerance: float
) -> None:
    mean = torch.stack([torch.stack(rank[name]["loss"]).double() for rank in ranks]).mean(0)
    assert (mean - torch.stack(losses).double()).abs().max() <= tolerance, name


def test_losses_under_bf16_mixed_are_near_those_in_float32(one, four):
    """bfloat16 rounds to 4e-3."""
    assert_near([rank["precisions"] for rank in four], "bf16", one[1], 1e-2)


@pytest.mark.faults
def test_other_precisions_and_compiled_sublayers(one):
    """With weights in bfloat16 each update is rounded too, but those of the gates."""
    cases = {
        "fp32": (1e-5, torch.float32),
        "bf16 weights": (1e-1, torch.bfloat16),
        "compiled": (1e-5, torch.float32),
    }
    ranks = run_ranks(in_precisions, 4, tuple(cases), timeout_s=280)
    for name, (tolerance, dtype) in cases.items():
        assert_near(ranks, name, one[1], tolerance)
        for rank in ranks:
            assert rank[name]["gathered"] == {
                "gate": torch.float32,
                "matrix": dtype,
                "stream": dtype,
            }
            assert rank[name]["while open"] == []


@pytest.mark.faults  # a user's module with split weights: tests/conform/test_own.py
def test_a_users_own_module_is_split_and_equal_to_replicated(tmp_path):
    ranks = run_ranks(on_two, 2, tmp_path)
    for dense in ("replicated", "auto"):
        for one, other in zip(
            *(rank[dense]["experts of a second fit"] for rank in ranks), strict=True
        ):
            assert torch.equal(one, other), "both ranks hold all experts"
    for rank in ranks:
        replicated, sharded = rank["replicated"], rank["auto"]
        assert (replicated["split"], sharded["split"]) == (False, True)
        assert (replicated["inference mode"], sharded["inference mode"]) == (True, False)
        assert (replicated["values"] - sharded["values"]).abs().max() <= TOLERANCE
        for name, weight in replicated["weights"].items():
            apart = (weight - sharded["weights"][name]).abs()
            if (
                "qkv.bias" in name
            ):  # K's third has no gradient, and its noise moves it as far as AdamW's step
                apart = apart.unflatten(0, (3, -1))[[0, 2]]
            assert apart.max() <= TOLERANCE, name
