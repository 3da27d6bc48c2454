"""The analyses of Fig. 9 and 10 measure at their steps, store what they measured, and add nothing
when they are off."""

import csv

import numpy as np
import pytest
import torch

from scmoe.config.load import load_config
from scmoe.moe.recorded_routing import read_routing
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.assembly.trainer import build_callbacks
from scmoe.training.callbacks.analysis import Analysis
from scmoe.training.run.loggers import build_loggers, close_loggers
from tests.support.models import hooks
from tests.support.trainer_of import trainer_of

TINY = (
    *(
        "model.layers=4",
        "model.dim=16",
        "model.heads=2",
        "moe.num_experts=4",
        "moe.architecture=dgmoe",
    ),
    *("data.name=synthetic", "data.vocab_size=64", "data.seq_len=8", "data.global_batch_size=4"),
    *(
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "trainer.threads=1",
        "trainer.log_every=100",
    ),
    *(
        "trainer.val_every=100",
        "trainer.checkpoint_every=4",
        "logger.mode=disabled",
        "trainer.accumulate=2",
    ),
)
ON = (
    "analysis.gating_every=2",
    "analysis.similarity_every=3",
    "analysis.gradients_every=3",
    "analysis.record_routing=2",
)


def fit(run_dir, *words, resume=False):
    """Train. Return the callbacks, and the number of the model's hooks at the start of each batch
    and at the end."""
    config = load_config(None, [*TINY, *words])
    torch.manual_seed(0)
    callbacks = build_callbacks(config, run_dir)
    module, seen = build_module(config), []
    task_loss = module.training_step

    def counting(batch, batch_idx):
        seen.append(hooks(module.model))
        return task_loss(batch, batch_idx)

    module.training_step = counting
    loggers = build_loggers(config, run_dir, resumed_step=4 if resume else None)
    trainer = trainer_of(config, callbacks, loggers)
    callbacks[
        -1
    ].save_top_k = -1  # of LastCheckpoint: the run is resumed from a step before its last
    trainer.fit(
        module,
        build_datamodule(config),
        ckpt_path=run_dir / "checkpoints" / "step=4.ckpt" if resume else None,
        weights_only=True,
    )
    close_loggers(loggers)
    return [c for c in callbacks if isinstance(c, Analysis)], [*seen, hooks(module.model)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    _, off = fit(tmp_path_factory.mktemp("off"), "trainer.max_steps=4")
    _, on = fit(run_dir, *ON, "trainer.max_steps=6")
    return run_dir, off, on


def test_an_analysis_that_is_off_adds_no_callback_and_no_hook(finished):
    _, off, on = finished
    config = load_config(None, TINY)
    assert not [c for c in build_callbacks(config, None) if isinstance(c, Analysis)]
    guard = off[0]  # the guard's hooks are always there
    assert set(off[:-1]) == {guard}
    gating, similarity = 3 * 2, 2 * (1 + 3 + 1)
    gradients = similarity
    routing = 2
    first_batches = {  # a step has two batches
        0: gating + similarity + gradients + routing,
        6: similarity + gradients,
    }
    first_batches |= dict.fromkeys((4, 8), gating + routing)
    assert [count - guard for count in on[:-1]] == [
        first_batches.get(batch, 0) for batch in range(12)
    ]
    assert on[-1] == off[-1]


def test_measurements_are_stored_logged_and_drawn(finished):
    run_dir, _, _ = finished
    folder = run_dir / "analysis"
    pictured = {f"{n}.{s}" for n in ("gating", "similarity", "gradients") for s in ("npz", "png")}
    assert {path.name for path in folder.iterdir()} == pictured | {"routing"}
    recorded = read_routing(folder / "routing")
    assert recorded.steps == [0, 2, 4]
    assert [tuple(ids_STK.shape) for ids_STK in recorded.ids] == [(3, 2 * 8, 2)] * 2, (
        "the first batch: 2 of 4 texts"
    )
    with np.load(folder / "gating.npz", allow_pickle=False) as stored:
        assert stored["steps"].tolist() == [0, 2, 4]
        assert stored["labels"].tolist() == ["MoE layer 0", "MoE layer 1"]
        assert stored["values"].shape == (3, 2, 4) and np.isfinite(stored["values"]).all()
        repeated = stored["values"][:, :, 0].mean(1)
    with np.load(folder / "similarity.npz", allow_pickle=False) as stored:
        assert stored["steps"].tolist() == [0, 3]
        assert stored["values"].shape == (2, 9, 9) and stored["labels"][-1] == "3 MoE"
        labels = stored["labels"].tolist()
    with np.load(folder / "gradients.npz", allow_pickle=False) as stored:
        assert stored["labels"].tolist() == labels
        assert stored["values"].shape == (2, 9, 1) and (stored["values"] > 0).all()
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("gating/repeated_selection")]
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    assert [float(row["gating/repeated_selection"]) for row in rows] == pytest.approx(
        repeated.tolist()
    )


def test_a_resumed_run_keeps_earlier_measurements(finished):
    run_dir, _, _ = finished
    with np.load(run_dir / "analysis" / "gating.npz", allow_pickle=False) as stored:
        before = stored["values"]
    recorded = read_routing(run_dir / "analysis" / "routing")
    (run_dir / "analysis" / "routing" / "step-00000004.safetensors").write_bytes(
        b"of a step that is run again"
    )
    fit(run_dir, *ON, "trainer.max_steps=7", resume=True)
    with np.load(run_dir / "analysis" / "gating.npz", allow_pickle=False) as stored:
        assert stored["steps"].tolist() == [0, 2, 4, 6]
        assert np.array_equal(stored["values"][:2], before[:2])
    resumed = read_routing(run_dir / "analysis" / "routing")
    assert resumed.steps == [0, 2, 4, 6]
    assert all(torch.equal(a[:3], b) for a, b in zip(resumed.ids, recorded.ids, strict=True))
