"""Checkpoints on a storage that fsspec reaches by a protocol: what `ddp` does there, on several
ranks, and when the storage fails."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.engine.ranks import run_ranks
from scmoe.api import MoE
from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.durable import MANIFEST
from scmoe.parallel.checkpoint.remote import Remote, downloaded
from tests.support.lightning_net import (
    HIDDEN,
    Net,
    clones,
    differences,
    error_of,
    in_one_file,
    loader,
)
from tests.support.trainings import users_trainer
from tests.support.vault import Vault, open_vault

pytestmark = pytest.mark.ranks


class Sparse(Net):
    """A Net with experts, which ranks share."""

    def configure_model(self) -> None:
        if not hasattr(self, "moe"):
            torch.manual_seed(2)
            self.moe = MoE(HIDDEN, 4, group=self.wire)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.moe(self.backbone(x)[None])[0][0])


def saver(folder: str, **how: Any) -> ModelCheckpoint:
    usual = {"monitor": "loss", "save_top_k": 2, "save_last": True, "every_n_train_steps": 1}
    return ModelCheckpoint(folder, "{step}", **(usual | how))


def fit(
    ranks: int, strategy: Any, folder: str, make: Callable[[], Net], ckpt_path: Any = None
) -> tuple[Any, Net, ModelCheckpoint]:
    kept, module = saver(folder), make()
    trainer = users_trainer(
        ranks,
        strategy,
        callbacks=[kept],
        enable_checkpointing=True,
        max_epochs=1 if ckpt_path is None else 2,
    )
    trainer.fit(module, loader(8), loader(4), ckpt_path=ckpt_path, weights_only=False)
    return trainer, module, kept


# ---------------------------------------------------------------------- as under ddp


def used_in_one_process(rank: int, world_size: int, folder: Path) -> list[Any]:
    """Return what a user of Lightning sees, under ddp and under the Strategy."""
    os.chdir(folder)
    files = fsspec.filesystem("memory")
    seen = []
    for way, strategy in {
        "ddp": lambda: "ddp",
        "foreground": ExpertParallelStrategy,
        "background": lambda: ExpertParallelStrategy(async_checkpoint=True),
    }.items():
        url = f"memory://{way}"
        trainer, module, kept = fit(1, strategy(), f"{url}/run", Net)
        validated = trainer.validate(
            ckpt_path="best", dataloaders=loader(8), verbose=False, weights_only=False
        )
        file = in_one_file(kept.best_model_path)
        read = Net.load_from_checkpoint(file, weights_only=False)
        _, resumed, _ = fit(1, strategy(), f"{url}/again", Net, kept.last_model_path)
        rooted = users_trainer(1, strategy(), default_root_dir=f"{url}/root", max_steps=1)
        rooted.fit(Net(), loader(8))
        for path in (f"{url}/root/a.ckpt", f"{url}/root/b.ckpt", f"file://{folder}/{way}.ckpt"):
            rooted.save_checkpoint(path)
        rooted.strategy.remove_checkpoint(f"{url}/root/a.ckpt")
        seen.append(
            {
                "files": sorted(
                    path.removeprefix(f"/{way}/")
                    for part in ("run", "again", "root")
                    for path in files.ls(f"/{way}/{part}", detail=False)
                ),
                "best": kept.best_model_path.removeprefix(url),
                "last": kept.last_model_path.removeprefix(url),
                "validated": validated,
                "read": clones(read.state_dict()),
                "trained": clones(module.state_dict()),
                "resumed": clones(resumed.state_dict()),
            }
        )
    return [*seen, sorted(path.name for path in folder.iterdir())]


def test_a_remote_folder_is_used_as_under_ddp(tmp_path):
    ((ddp, foreground, background, local),) = run_ranks(used_in_one_process, 1, tmp_path)
    assert not differences(ddp, foreground)
    assert not differences(ddp, background)
    assert local == ["background.ckpt", "ddp.ckpt", "foreground.ckpt"], "file:// is a local path"


# ---------------------------------------------------------------------- several ranks


def used_by_two_ranks(rank: int, world_size: int, folder: Path, background: bool) -> dict[str, Any]:
    open_vault(folder / "vault")
    os.environ["TMPDIR"] = str(folder / "scratch")
    tempfile.tempdir = None
    ends = {}
    for name, place in (("local", str(folder / "local")), ("remote", "vault://bucket/run")):
        strategy = ExpertParallelStrategy(async_checkpoint=background)
        trainer, module, kept = fit(world_size, strategy, place, Sparse)
        best = trainer.validate(
            ckpt_path="best", dataloaders=loader(8), verbose=False, weights_only=False
        )
        trainer, resumed, _ = fit(
            world_size, ExpertParallelStrategy(), f"{place}-again", Sparse, kept.last_model_path
        )
        ends[name] = {
            "trained": clones(module.state_dict()),
            "best": best,
            "names": [Path(path).name for path in (kept.best_model_path, kept.last_model_path)],
            "resumed": clones(resumed.state_dict()),
        }
    return ends


@pytest.mark.parametrize(
    "background",
    [
        pytest.param(False, id="foreground"),
        pytest.param(True, id="background", marks=pytest.mark.faults),
    ],
)
def test_ranks_save_to_a_remote_folder_what_they_save_to_a_local_one(background, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "vault").mkdir()
    for ends in run_ranks(used_by_two_ranks, 2, tmp_path, background):
        assert not differences(ends["local"], ends["remote"])
    remote, local = tmp_path / "vault/bucket/run", tmp_path / "local"
    assert {path.name: durable.verify(path) for path in remote.iterdir()} == {
        path.name: durable.verify(path) for path in local.iterdir()
    }, "each is a whole checkpoint, also as a copy on a local disk"
    shards = list((remote / "last.ckpt").glob("*.safetensors"))
    assert len(shards) == 2, "each rank uploads its own file, and what was there before is gone"
    assert not list((tmp_path / "scratch").iterdir())


# ---------------------------------------------------------------------- faults


class Refusing(Callback):
    """From the third step on the storage takes no file whose name has this part."""

    def __init__(self, part: str) -> None:
        self.part = part

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        Vault.refused = self.part if trainer.global_step == 2 else None


def saved_in_vain(rank: int, world_size: int, folder: Path, part: str) -> tuple[str, int, int]:
    """Return the error of the third save to one path, the step of what is there then, and the
    number of files there after another save."""
    open_vault(folder / "vault")

    def train(*callbacks: Callback) -> None:
        kept = saver("vault://bucket", save_top_k=0)
        kept._enable_version_counter = False
        how = {"callbacks": [kept, *callbacks], "enable_checkpointing": True, "max_steps": 3}
        users_trainer(world_size, "expert_parallel", **how).fit(Sparse(), loader(8))

    error = error_of(lambda: train(Refusing(part)))
    Vault.refused = None
    with downloaded(Remote("vault://bucket/last.ckpt")) as copy:
        step = durable.verify(copy)
    train()
    return error, step, len(os.listdir(folder / "vault/bucket/last.ckpt"))


@pytest.mark.faults
@pytest.mark.parametrize("part", ["shard-00002", "meta.json", MANIFEST])
def test_an_upload_that_fails_leaves_the_checkpoint_before_it(part, tmp_path):
    for error, step, files in run_ranks(saved_in_vain, 2, tmp_path, part):
        assert error.startswith("OSError: vault://bucket/last.ckpt could not be written")
        assert "Access Denied" in error and step == 2
        assert files == 4, "two shards, meta.json and the manifest, and nothing that failed"


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lead_outside(file: Path) -> None:
    content = json.loads(file.read_bytes())
    files = {f"../../{name}": value for name, value in content["files"].items()}
    file.write_text(durable.sealed({"step": content["step"], "files": files}))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a flipped byte": ("*shard-00002*", flip_a_byte, "is damaged"),
    "a lost file": ("*shard-00002*", Path.unlink, "is missing"),
    "no manifest": (MANIFEST, Path.unlink, "is not a complete checkpoint"),
    "another folder's files": (MANIFEST, lead_outside, "is damaged"),
}


def read_damaged(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """Return the error of each damage, of a path where nothing is, and of another strategy's
    file."""
    open_vault(folder / "vault")
    trainer = users_trainer(world_size, "expert_parallel", max_steps=1)
    trainer.fit(Sparse(), loader(8))
    urls = {"nothing": "vault://bucket/nothing.ckpt", "file": "vault://bucket/file.ckpt"}
    for name, (pattern, damage, _) in DAMAGES.items():
        urls[name] = f"vault://bucket/{name.replace(' ', '-')}.ckpt"
        trainer.save_checkpoint(urls[name])
        if rank == 0:
            (file,) = (folder / "vault").glob(urls[name].removeprefix("vault://") + f"/{pattern}")
            damage(file)
    (folder / "vault/bucket/file.ckpt").write_text("")
    trainer.strategy.barrier()
    return {
        name: error_of(lambda url=url: trainer.strategy.load_checkpoint(url))  # type: ignore[misc]
        for name, url in urls.items()
    }


@pytest.mark.faults
def test_a_damaged_remote_checkpoint_is_refused_by_its_url(tmp_path):
    expected = {"nothing": "does not exist", "file": "is one file"}
    expected |= {name: message for name, (_, _, message) in DAMAGES.items()}
    for errors in run_ranks(read_damaged, 2, tmp_path):
        for name, message in expected.items():
            kind = "MissingCheckpoint" if name == "nothing" else "BrokenCheckpoint"
            assert errors[name].startswith(f"{kind}: vault://bucket/{name.replace(' ', '-')[:4]}")
            assert message in errors[name] and tempfile.gettempdir() not in errors[name]


class Stopped(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def stopped(rank: int, world_size: int) -> list[str]:
    """Return what is in the remote `default_root_dir` of a training that was asked to stop."""
    trainer = users_trainer(
        1, "expert_parallel", callbacks=[Stopped()], default_root_dir="memory://root"
    )
    with pytest.raises(SystemExit):
        trainer.fit(Net(), loader(16))
    return sorted(fsspec.filesystem("memory").ls("/root", detail=False))


def test_a_stopped_training_saves_to_its_remote_folder():
    ((path,),) = run_ranks(stopped, 1)
    assert path.startswith("/root/step=")


def loaded_without_ranks(rank: int, world_size: int) -> list[str]:
    trainer = users_trainer(1, "expert_parallel")
    return [
        error_of(lambda: trainer.strategy.load_checkpoint("memory://a.ckpt")),
        error_of(lambda: trainer.strategy.save_checkpoint({}, "memory://a.ckpt")),
    ]


def test_a_load_or_a_save_without_ranks_says_what_to_do():
    ((load, save),) = run_ranks(loaded_without_ranks, 1)
    assert "RuntimeError: no checkpoint can be loaded here: the ranks" in load
    assert "RuntimeError: no checkpoint can be saved here: the ranks" in save
