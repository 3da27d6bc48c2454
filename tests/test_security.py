"""Faults 33-36: no key is stored, nothing in a YAML or a checkpoint is executed, and runs stay
under their root."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.engine.ranks import run_ranks
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.parallel.checkpoint.state import from_json
from scmoe.training.assembly.model import build_model
from scmoe.training.run.directory import create_run_dir
from tests.support.commands import CANARY, run
from tests.support.trainings import fit, tiny

pytestmark = [pytest.mark.faults]


# ---------------------------------------------------------------------- keys


KEYS = {
    "variable": CANARY,
    "W&B's variable": CANARY.upper(),
    "netrc": CANARY[::-1],
    "a long secret": " ".join(["correct horse battery staple"] * 4),
    "W&B": "0123456789" * 4,
    "W&B, new": "wandb_v1_" + "Ab0_" * 19,
    "Hugging Face": "hf_" + "aB3" * 11,
}


@pytest.mark.slow
def test_a_key_is_in_no_file_of_a_run_and_in_no_file_s_name(tmp_path):
    """Keys are in variables, in netrc, in the command line, and written into a script."""
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEYS['netrc']}\n")
    netrc.chmod(0o600)
    overrides = [f"logger.group={KEYS['a long secret']}", f"logger.project={KEYS['W&B']}"]
    overrides += [f"logger.tags=[{CANARY},{KEYS['Hugging Face']}]"]
    variables = {
        "MY_TOKEN": CANARY,
        "db_password": KEYS["a long secret"],
        "WANDB_API_KEY": KEYS["W&B's variable"],
    }
    variables |= {"HOME": str(tmp_path), "NETRC": str(netrc)}
    written = [key for what, key in KEYS.items() if what != "netrc"]
    done = run("-c", WITH_KEYS, str(tmp_path), json.dumps(written), *overrides, **variables)
    assert done.code == 0, done.err
    (run_dir,) = (tmp_path / "runs").glob("scmoe/*")
    environment = json.loads((run_dir / "env.json").read_text())
    assert environment["git_diff"].count("*****") == len(written), (
        "the changes are stored without the keys"
    )
    assert len(environment["git_commit"]) == 40, "a commit's name is not redacted"
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "overrides.txt", "env.json"} <= {path.name for path in files}
    assert {".ckpt", ".wandb"} <= {path.suffix for file in files for path in (file, file.parent)}
    for what, key in KEYS.items():
        part = key.split(" ")[-1]  # YAML puts spaces and line ends between words
        assert part not in done.out + done.err, what
        assert not [
            path for path in files if part.encode() in str(path).encode() + path.read_bytes()
        ], what


WITH_KEYS = """
import json, os, subprocess, sys
from scmoe.config.load import load_config
from scmoe.training.run.train import train
folder, keys, *overrides = sys.argv[1:]
os.chdir(folder)
git = ["git", "-c", "user.name=a", "-c", "user.email=a"]
open("script.py", "w").write("# the keys come here\\n")
for command in (["init", "-q"], ["add", "script.py"], ["commit", "-qm", "before"]):
    subprocess.run([*git, *command], check=True)
open("script.py", "w").write("".join(f"key = {key!r}\\n" for key in json.loads(keys)))
config = load_config(None, [
    "model.layers=2", "model.dim=16", "model.heads=2", "moe.num_experts=4",
    "data.name=synthetic", "data.vocab_size=64", "data.seq_len=8", "data.global_batch_size=4",
    "trainer.accelerator=cpu", "trainer.progress=false", "trainer.threads=1", "trainer.max_steps=2",
    "logger.mode=offline", "runs_dir=runs", *overrides,
])
assert train(config, overrides)["steps"] == 2
"""


# ---------------------------------------------------------------------- checkpoints


class Payload:
    """This object creates the file `proof` when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Return a checkpoint of a tiny model, saved by one rank."""
    folder = tmp_path_factory.mktemp("written")
    run_ranks(write_checkpoint, 1, folder)
    return folder / "step=1.ckpt"


def write_checkpoint(rank: int, world_size: int, folder: Path) -> None:
    fit(tiny("position=pos2 trainer.max_steps=1", world_size)).save_checkpoint(
        folder / "step=1.ckpt"
    )


def reseal(path: Path) -> None:
    """Do what an attacker who knows the format would: writes a manifest of the changed files."""
    step = json.loads((path / durable.MANIFEST).read_text())["step"]
    (path / durable.MANIFEST).unlink()
    files = {
        str(file.relative_to(path)): durable.fingerprint(file)
        for file in path.rglob("*")
        if file.is_file()
    }
    (path / durable.MANIFEST).write_text(durable.sealed({"step": step, "files": files}))


PLACES = ("meta.json", "manifest.json", ".metadata", "extra.pt", "data.pkl", "shard")


@pytest.mark.ranks
@pytest.mark.representative
@pytest.mark.parametrize("sealed", [False, True], ids=["not sealed", "sealed again"])
@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_in_a_checkpoint_is_not_run(place, sealed, written, tmp_path):
    path, proof = tmp_path / "step=1.ckpt", tmp_path / "executed"
    shutil.copytree(written, path)
    name = next(path.glob("*.safetensors")).name if place == "shard" else place
    (path / name).write_bytes(pickle.dumps(Payload(proof)))
    if sealed and place != "manifest.json":
        reseal(path)
    model = build_model(tiny("position=pos2"))
    refused = None
    try:
        load_model(path, model)
    except (
        Exception
    ) as error:  # the kind of error does not matter here, only whether the pickle was executed
        refused = error
    assert not proof.exists(), "the pickle was executed"
    if not sealed:
        assert isinstance(refused, durable.BrokenCheckpoint)
        assert name in str(refused)


@pytest.mark.representative
def test_the_payload_works_where_pickles_are_read(tmp_path):
    """Otherwise the tests above would show nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.representative
def test_resuming_reads_meta_as_json(tmp_path):
    """Only resuming reads meta.json, so the tests with `load_model` do not cover it."""
    proof = tmp_path / "executed"
    with pytest.raises(ValueError):
        json.loads(pickle.dumps(Payload(proof), protocol=0), object_hook=from_json)
    assert not proof.exists()


@pytest.mark.representative
@pytest.mark.parametrize("dtype", ["load", "os", "__builtins__", "hub", "Tensor", "nothing"])
def test_a_dtype_in_meta_must_be_a_dtype(dtype):
    with pytest.raises((AssertionError, ValueError, AttributeError)):
        from_json({"__tensor__": [1], "dtype": dtype})


# ---------------------------------------------------------------------- YAML

YAML = (
    "model:\n  _target_: os.system\n  _args_: ['touch {proof}']\n",
    "_target_: pathlib.Path.touch\n",
    "name: !!python/object/apply:os.system ['touch {proof}']\n",
    "name: !!python/object:pathlib.Path {{}}\n",
    "name: !!python/name:os.system\n",
    "name: !!python/module:antigravity\n",
    "data:\n  path: !!python/object/new:os.system ['touch {proof}']\n",
    "name: ${{oc.env:WANDB_API_KEY}}\n",
    "name: ${{oc.env:HOME,x}}\n",
    "data:\n  path: ${{oc.create:{{}}}}\n",
    "data:\n  path: ${{oc.decode:x}}\n",
    "logger:\n  tags: ['${{oc.env:HOME}}']\n",
    "data:\n  tokenizer: ${{name}}\n",
    "optim:\n  lr: __import__('os').system('touch {proof}')\n",
    "seed: 1 + 1\n",
    "name: &a [*a]\n",
)


@pytest.mark.representative
@pytest.mark.parametrize("text", YAML)
def test_nothing_in_a_yaml_is_executed(text, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    proof = tmp_path / "executed"
    (tmp_path / "bad.yaml").write_text(text.format(proof=proof))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "bad.yaml")
    assert not proof.exists()
    assert CANARY not in str(caught.value)


# ---------------------------------------------------------------------- names

NAMES = (
    *(
        "../x",
        "..",
        ".",
        "/x",
        "a/b",
        "a/../../b",
        "..\\x",
        "a\\b",
        "C:x",
        "~",
        "~/x",
        "~root",
        "$HOME",
        "`id`",
    ),
    *(
        "a b",
        " a",
        "a\n",
        "a\nb",
        "a\tb",
        "a\x00b",
        "-rf",
        "--help",
        ".hidden",
        "_x",
        "a;b",
        "a|b",
        "a*",
        "a?",
        "é",
    ),
    *("\u202etxt", "\uff0e\uff0e\uff0fx", "%2e%2e%2fx", "a" * 300, "{a}", "con:"),
)


@pytest.mark.representative
@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_hostile_name_is_refused_or_stays_under_the_root(name, tmp_path):
    """A run's name may be in a config and in overrides, which become the name of its folder."""
    (tmp_path / "c.yaml").write_text(f"name: {json.dumps(name)}\n")
    root, outside = tmp_path / "runs", set(tmp_path.parent.iterdir())
    run_dir = create_run_dir(root, "a", [f"x={name}"], "")
    assert run_dir.resolve().parent == (root / "a").resolve()
    try:
        config = load_config(tmp_path / "c.yaml", [f"runs_dir={root}"])
    except ConfigError:
        return
    run_dir = create_run_dir(root, config.name, ["name=../../x", f"model.dim={name}"], "")
    assert run_dir.resolve().is_relative_to(root.resolve())
    assert set(tmp_path.parent.iterdir()) == outside
