"""A W&B key is looked for where W&B itself does, so `logger.mode: auto` uses W&B where W&B would
find a key. Where W&B cannot start, the reason is named."""

import pytest
import wandb

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.training.run import train
from scmoe.training.run.wandb_logger import has_wandb_key, wandb_logger

OURS, LAB = "api.wandb.ai", "http://wandb.lab:8080"


@pytest.mark.parametrize(
    ("entry", "variables", "found"),
    [
        (None, {}, False),
        (None, {"WANDB_API_KEY": "k" * 40}, True),
        (OURS, {}, True),
        ("no netrc", {}, False),
        ("api.github.com", {}, False),
        (OURS, {"WANDB_BASE_URL": LAB}, False),
        ("wandb.lab:8080", {"WANDB_BASE_URL": LAB}, True),
        ("wandb.lab", {"WANDB_BASE_URL": LAB}, False),  # W&B requires the port too
        (OURS, {"NETRC": "elsewhere"}, True),
    ],
)
def test_a_key_in_netrc_counts_only_for_its_server(entry, variables, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.setenv(name, variables.get(name, ""))
    if entry is not None:
        path = tmp_path / variables.get("NETRC", ".netrc")
        path.write_text(f"machine {entry} login user password {'k' * 40}\n")
    assert has_wandb_key() == found


@pytest.mark.parametrize("words", [["logger.mode=online"], []])
def test_online_without_a_key_is_refused_before_anything_is_built(words, tmp_path, monkeypatch):
    for name, value in {
        "HOME": tmp_path,
        "WANDB_API_KEY": "",
        "NETRC": "",
        "WANDB_MODE": "online",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(train, "build_model_on_meta", None)
    with pytest.raises(ConfigError, match="is online, but no key"):
        train.checked_model(load_config(None, [*words, f"runs_dir={tmp_path}"]))


def test_an_error_of_wandb_without_a_text_is_named_by_its_type(tmp_path, monkeypatch):
    def refused(**_):
        raise ConnectionResetError

    monkeypatch.setattr(wandb, "setup", lambda settings: None)
    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ConfigError, match="ConnectionResetError"):
        wandb_logger(tmp_path, load_config(None, ["logger.mode=online"]))
