"""A W&B key is looked for where W&B itself does, so `logger.mode: auto` uses W&B where W&B would find a key."""

from __future__ import annotations

import pytest

from scmoe.training.run.loggers import has_wandb_key

ENTRY = "machine {} login user password {}\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_no_key_is_found_where_there_is_none(home):
    assert not has_wandb_key()
    (home / ".netrc").write_text("this is no netrc\n")
    assert not has_wandb_key()


def test_a_key_in_the_environment_is_found(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert has_wandb_key()


@pytest.mark.parametrize(
    ("entry", "server", "found"),
    [
        ("api.wandb.ai", "", True),
        ("api.github.com", "", False),
        ("api.wandb.ai", "http://wandb.lab:8080", False),
        ("wandb.lab:8080", "http://wandb.lab:8080", True),
        ("wandb.lab", "http://wandb.lab:8080", False),  # W&B requires the port too
    ],
)
def test_a_key_in_netrc_counts_only_for_its_server(entry, server, found, home, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", server)
    (home / ".netrc").write_text(ENTRY.format(entry, "k" * 40))
    assert has_wandb_key() == found


def test_netrc_may_be_elsewhere(home, monkeypatch):
    (home / "elsewhere").write_text(ENTRY.format("api.wandb.ai", "k" * 40))
    monkeypatch.setenv("NETRC", str(home / "elsewhere"))
    assert has_wandb_key()
