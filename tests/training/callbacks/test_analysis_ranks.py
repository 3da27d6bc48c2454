"""Two expert-parallel ranks measure the same values for Fig. 9 and 10 as one process, and record
the same routing.

The bound is 1e-9 in float64 after two steps of training: ranks do the same sums in another order,
and distances are up to about 10.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.engine.ranks import run_ranks
from scmoe.config.load import load_config
from scmoe.moe.recorded_routing import read_routing
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import build_callbacks
from tests.support.architectures import overrides
from tests.support.trainer_of import trainer_of

pytestmark = [pytest.mark.ranks, pytest.mark.faults]

TINY = (
    *(
        "model.dim=16",
        "model.heads=2",
        "moe.num_experts=4",
        "moe.capacity_factor=null",
        "data.global_batch_size=8",
    ),
    *(
        "trainer.accelerator=cpu",
        "trainer.precision=64-true",
        "trainer.max_steps=3",
        "trainer.accumulate=2",
    ),
    *(
        "trainer.progress=false",
        "trainer.threads=1",
        "trainer.checkpoint_every=100",
        "trainer.val_every=100",
    ),
    "optim.warmup_steps=1",
    *(
        "analysis.gating_every=2",
        "analysis.similarity_every=2",
        "analysis.record_routing=2",
        "moe.noisy=false",
    ),
)
TEXT = "data.name=synthetic data.vocab_size=64 data.seq_len=8 model.layers=4"
PICTURES = (
    "model.family=swin model.layers=2 model.patch_size=1 model.window=2 model.dim=8 model.heads=1 "
    "data.name=digits data.image_size=8 data.num_classes=10"
)
CASES = {
    "dgmoe": f"architecture=dgmoe position=pos2 {TEXT}",
    "pos3": f"position=pos3 {TEXT}",
    "sharded": f"position=pos2 {TEXT} strategy.dense=sharded",
    "top-2": f"architecture=top_k top_k=2 {TEXT}",
    "every block": f"position=pos1 every=1 {TEXT} model.family=llama",
    "swin": f"position=pos2 {PICTURES}",
}


def measure(rank: int, world_size: int, folder: Path) -> None:
    for name, text in CASES.items():
        config = load_config(None, [*TINY, f"trainer.devices={world_size}", *overrides(text)])
        run_dir = folder / str(world_size) / name
        if rank == 0:
            run_dir.mkdir(parents=True)
        callbacks = build_callbacks(config, run_dir if rank == 0 else None)
        trainer = trainer_of(config, callbacks, [])
        trainer.fit(build_module(config), build_datamodule(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    folder = tmp_path_factory.mktemp("analysis")
    for world_size in (1, 2):
        run_ranks(measure, world_size, folder)
    return folder


@pytest.mark.parametrize("quantity", ["gating", "similarity"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_measure_the_same_as_one(case, quantity, folder):
    one, two = (
        np.load(folder / str(n) / case / "analysis" / f"{quantity}.npz", allow_pickle=False)
        for n in (1, 2)
    )
    assert one["steps"].tolist() == two["steps"].tolist() == [0, 2]
    assert one["labels"].tolist() == two["labels"].tolist()
    np.testing.assert_allclose(two["values"], one["values"], rtol=1e-9, atol=1e-9, equal_nan=True)
    first, last = one["values"]
    assert np.nanmax(np.abs(last - first)) > 1e-6, (
        "the weights have changed, so the ranks' gradients count, too"
    )
    if quantity == "gating":
        assert np.isfinite(two["values"]).all() and (last[:, 1] > 0).all(), (
            "a distance of 0 would show nothing"
        )


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_record_the_routing_of_one_in_their_order(case, folder):
    """The ranks take the samples of a batch in turn, so the first rank has every other one."""
    one, two = (read_routing(folder / str(n) / case / "analysis" / "routing") for n in (1, 2))
    assert one.steps == two.steps == [0, 2] and (one.num_ranks, two.num_ranks) == (1, 2)
    for ids_STK, of_ranks_STK in zip(one.ids, two.ids, strict=True):
        num_samples = 4  # of the first of two batches
        of_samples = ids_STK.unflatten(1, (num_samples, -1))
        in_turn = torch.cat([of_samples[:, rank::2] for rank in range(2)], dim=1).flatten(1, 2)
        assert torch.equal(in_turn, of_ranks_STK)
        assert not torch.equal(ids_STK, of_ranks_STK)
