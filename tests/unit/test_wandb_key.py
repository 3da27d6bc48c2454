"""A W&B key is looked for where W&B itself does, so `logger.mode: auto` uses W&B where W&B would find a key."""

import pytest

from scmoe.training.run.loggers import has_wandb_key

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
