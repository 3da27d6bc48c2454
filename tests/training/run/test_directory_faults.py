"""Faults of ordinary use: what a run leaves, what resuming may change, and who writes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from experiments.engine.ranks import RankError, run_ranks
from scmoe.command_line import call
from scmoe.config.installation import scmoe
from scmoe.config.load import load_config
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.durable import verify
from scmoe.runs.seen import SeenRun
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.run.resume import resumption
from tests.support.commands import command_here, resume_in_ranks
from tests.support.trainer_of import trainer_of

pytestmark = [pytest.mark.ranks, pytest.mark.faults, pytest.mark.representative]

STEPS = ("trainer.max_steps=3", "trainer.checkpoint_every=2")
LEFT = ["best-step=2.ckpt", "step=3.ckpt"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[set[str]]]:
    """Return the directory of a finished run of three steps on two ranks, and what each rank wrote
    there."""
    runs = tmp_path_factory.mktemp("finished")
    command = (
        "configs/debug.yaml",
        "trainer.devices=2",
        *STEPS,
        f"runs_dir={runs}",
        "logger.mode=offline",
    )
    files = run_ranks(written, 2, runs, "train", command)
    return (runs / "latest").resolve(), files


@pytest.fixture(scope="module")
def finished(trained) -> Path:
    return trained[0]


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory) -> tuple[Path, list[set[str]]]:
    """Return a copy of that run, resumed by two ranks for a step and by one for another, and what
    the two wrote."""
    run_dir = Path(shutil.copytree(finished, tmp_path_factory.mktemp("resumed") / "run"))
    files = run_ranks(
        *(written, 2, run_dir, "resume"),
        (str(run_dir), "trainer.max_steps=4", "trainer.devices=2", "logger.mode=disabled"),
    )
    words = ("trainer.max_steps=5", "trainer.devices=1", "logger.mode=disabled")
    done = resume_in_ranks(1, str(run_dir), *words)
    assert done.summary["steps"] == 5
    return run_dir, files


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """Return a copy of the finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---------------------------------------------------------------------- the end of a run


def validated(rank: int, world_size: int, folder: Path, checkpoint: Path) -> float:
    config = load_config(folder / "config.yaml", ["trainer.devices=1"])
    trainer = trainer_of(config, [], [])
    (metrics,) = trainer.validate(
        build_module(config), build_datamodule(config), checkpoint, verbose=False
    )
    return metrics["val/loss"]


def test_a_finished_run_has_the_checkpoint_of_its_summary(finished):
    assert saved(finished) == LEFT, (
        "3 is not a multiple of checkpoint_every, and its save replaces the one of step 2"
    )
    last, summary = (
        finished / "checkpoints" / "step=3.ckpt",
        json.loads((finished / "summary.json").read_text()),
    )
    assert verify(last) == summary["steps"] == 3
    (loss,) = run_ranks(validated, 1, finished, last)
    # in float32, on one rank instead of two
    assert loss == pytest.approx(summary["val_loss"], rel=1e-6)


@pytest.mark.parametrize("which, name", [("best", LEFT[0]), ("last", LEFT[1])])
def test_an_export_says_which_checkpoint_it_is(which, name, finished, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    assert call("export", str(finished), "--which", which, "--out", str(out)) == 0
    assert capsys.readouterr().out == f"{out}, from the {which} checkpoint, {name}\n"
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["checkpoint"] == name


def test_an_export_that_nothing_could_load_is_refused(finished, tmp_path, capsys):
    assert call("export", str(finished), "--out", str(tmp_path / "model.bin")) == 2
    assert "can be loaded again" in capsys.readouterr().err


def test_an_export_replaces_no_other_config(finished, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    assert call("export", str(finished), "--out", str(tmp_path / "model.safetensors")) == 2
    assert "another config.yaml" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    for name in ("model", "other"):
        (tmp_path / f"{name}.safetensors").touch()
    assert call("export", str(finished), "--out", str(tmp_path / "model.safetensors")) == 2, (
        "other.safetensors uses it"
    )
    assert (
        tmp_path / "config.yaml"
    ).read_text() == "seed: 7\n" and "another config.yaml" in capsys.readouterr().err
    assert call("export", str(finished), "moe.position=pos1") == 2, (
        "it would be called another model"
    )
    assert "moe.position is 'pos1', allowed: 'pos2', as in" in capsys.readouterr().err


def test_a_resumed_run_keeps_only_its_own_last_step(resumed):
    run_dir, _ = resumed
    assert [name for name in saved(run_dir) if name.startswith("step")] == ["step=5.ckpt"]
    assert SeenRun(run_dir).steps == 5


# ---------------------------------------------------------------------- resuming


OTHERS = {
    "model.dim=96": "allowed: 32, as in",
    "moe.position=pos3": "allowed: 'pos2', as in",
    "moe.top_k=2": "allowed: 1, as in",
    "data.seq_len=32": "allowed: 16, as in",
    "data.global_batch_size=8": "allowed: 4, as in",
    "optim.lr=1": "allowed: 0.001, as in",
    "seed=2": "allowed: 1, as in",
    "name=other": "allowed: 'debug', as in",
    "trainer.max_steps=2": "Give 3 or more",
    "trainer.limit_train_batches=2": "Give 3 or more",
}


def test_another_model_or_experiment_is_refused_and_nothing_is_written(run_dir, capsys):
    before = contents(run_dir)
    for override, instead in OTHERS.items():
        assert call("resume", str(run_dir), override) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {override.partition('=')[0]} is ") and instead in line
    assert contents(run_dir) == before


def test_a_resumption_keeps_its_config_beside_the_first_one(finished, resumed):
    run_dir, _ = resumed
    assert (run_dir / "config.yaml").read_bytes() == (finished / "config.yaml").read_bytes()
    kept = [load_config(run_dir / f"config-from-{step}.yaml").trainer for step in (3, 4)]
    assert [(trainer.max_steps, trainer.devices) for trainer in kept] == [(4, 2), (5, 1)]


def test_weights_have_the_settings_that_they_were_trained_with(run_dir, tmp_path):
    """config.yaml was changed by hand to another model whose tensors have the same names and
    shapes."""
    config, out = run_dir / "config.yaml", tmp_path / "exported" / "model.safetensors"
    config.write_text(config.read_text().replace("position: pos2", "position: pos1", 1))
    assert load_config(config).moe.position == "pos1"
    assert call("export", str(run_dir), "--out", str(out)) == 0
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["settings"])["moe.position"] == "pos2"
    assert load_config(out.parent / "config.yaml").moe.position == "pos2"


def test_a_run_that_is_done_has_nothing_to_do(run_dir, capsys):
    before = contents(run_dir)
    assert call("resume", str(run_dir)) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((run_dir / "summary.json").read_text())
    assert scmoe("resume", run_dir) in said.err
    assert contents(run_dir) == before


# ---------------------------------------------------------------------- who writes


def written(
    rank: int, world_size: int, folder: Path, verb: str, arguments: tuple[str, ...]
) -> set[str]:
    """Return what a rank opens for writing, creates, renames or removes in a folder while it
    trains, outside of checkpoints."""
    found: set[str] = set()
    changes = ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.rmdir", "os.truncate")

    def note(event: str, details: tuple[Any, ...]) -> None:
        writes = (
            event == "open"
            and isinstance(details[2], int)
            and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        for path in details[:2] if writes or event in changes else ():
            if isinstance(path, (str, Path)) and str(path).startswith(str(folder)):
                found.add(str(Path(path).relative_to(folder)))

    sys.addaudithook(note)
    assert command_here(rank, world_size, verb, arguments, {}).code == 0
    return {path for path in found if "checkpoints/" not in path}


def test_only_rank_0_writes_into_the_run_directory(trained, resumed):
    for _, (first, second) in (trained, resumed):
        assert any(path.endswith("state.json") or ".tmp-state.json" in path for path in first), (
            "the hook sees writes"
        )
        assert second == set()


# ---------------------------------------------------------------------- a damaged checkpoint


def test_a_damaged_checkpoint_is_read_once_and_set_aside(run_dir, monkeypatch):
    """Choosing the checkpoint reads no file, as each rank does it. Loading finds the damage, and
    the next resumption takes the one before it. The error says how."""
    damaged = run_dir / "checkpoints" / LEFT[1]
    shard = next(damaged.glob("shard*"))
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with monkeypatch.context() as patch:
        patch.setattr(durable, "fingerprint", lambda path: pytest.fail(f"{path} is read"))
        assert (
            resumption(run_dir, ["trainer.devices=1", "trainer.max_steps=4"])[1].checkpoint
            == damaged
        )
    with pytest.raises(RankError, match=r"BrokenCheckpoint: .*is damaged") as caught:
        words = ("trainer.devices=1", "trainer.max_steps=4", "logger.mode=disabled")
        resume_in_ranks(1, str(run_dir), *words)
    assert scmoe("resume", run_dir) in str(caught.value)
    assert saved(run_dir) == LEFT[:1] and len(list((run_dir / "set-aside").iterdir())) == 1
    assert (
        resumption(run_dir, ["trainer.devices=1", "trainer.max_steps=4"])[1].checkpoint.name
        == LEFT[0]
    )
