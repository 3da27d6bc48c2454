"""Routing is recorded beside a training and ends none."""

from types import SimpleNamespace

import torch

from scmoe.parallel.wire.wire import Wire
from scmoe.training.callbacks.record_routing import RecordRouting


def test_a_folder_that_cannot_be_made_ends_no_training(tmp_path, capsys):
    (tmp_path / "analysis").write_text("a file")
    callback = RecordRouting(1, tmp_path / "analysis")
    callback.on_train_start(SimpleNamespace(global_step=0), None)
    callback.step, callback.probe = (
        0,
        SimpleNamespace(result=lambda: [torch.zeros(2, 1)], num_experts=2),
    )
    callback.on_train_batch_end(None, SimpleNamespace(wire=Wire()))
    assert "step-00000000.safetensors is not written" in capsys.readouterr().err
