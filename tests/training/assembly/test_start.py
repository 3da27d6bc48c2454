"""What a training knows before it begins is worked out once."""

from contextlib import redirect_stderr
from io import StringIO

import torch

from scmoe import files
from scmoe.config.fields import Config
from scmoe.config.load import load
from scmoe.config.registry import FAMILIES
from scmoe.training.assembly.start import Start
from scmoe.training.run.train import train


def test_a_training_builds_one_model_on_meta_and_redacts_its_config_once(tmp_path, monkeypatch):
    devices, redactions = [], []
    build, starred = FAMILIES["gpt"], files._starred

    def build_and_note(config, wire):
        devices.append(torch.get_default_device().type)
        return build(config, wire)

    def star_and_note(value, keys):
        redactions.append(value)
        return starred(value, keys)

    monkeypatch.setitem(FAMILIES.makers, "gpt", build_and_note)
    monkeypatch.setattr(files, "_starred", star_and_note)
    words = ["trainer.fast_dev_run=true", "strategy.dense=auto", "trainer.progress=false"]
    with redirect_stderr(StringIO()):
        train(Start.of(load("debug", [*words, f"runs_dir={tmp_path}"])))
    assert sorted(devices) == ["cpu", "meta"]
    assert sum(isinstance(value, Config) for value in redactions) == 1
