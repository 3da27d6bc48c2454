"""Every private Lightning or torch name that scmoe uses is still as it expects: an upgrade fails here, by name."""

import ast
import inspect
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

SIGNATURES = {  # name: where it is, its parameters
    "_set_params_and_buffers_to_ignore_for_model": (
        DistributedDataParallel,
        ["module", "params_and_buffers_to_ignore"],
    ),
    "_broadcast_sigterm_tensor": (_TrainingEpochLoop, ["self"]),
    "_get_train_description": (RichProgressBar, ["self", "current_epoch"]),
}
OTHERS = {"_timeout", "_execution_engine", "_compiled_call_impl", "_getframe", "_replace"}  # the last two: Python's own


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    owner, parameters = SIGNATURES[name]
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_the_others_exist():
    assert DDPStrategy()._timeout is not None
    assert hasattr(nn.Module(), "_compiled_call_impl")
    assert callable(Variable._execution_engine.queue_callback)
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel.__init__)


def test_no_other_private_name_is_used():
    used, own = {}, set()
    for path in (Path(__file__).parents[2] / "scmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                on_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                if isinstance(node.ctx, ast.Store) and on_self:
                    own.add(node.attr)
                used.setdefault(node.attr, path.name)
    foreign = {name: where for name, where in used.items() if name not in own | SIGNATURES.keys() | OTHERS}
    assert not foreign
