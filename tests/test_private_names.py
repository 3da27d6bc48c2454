"""Every private name of Lightning and torch that the product uses is still as expected, and only
one file uses them.

Private names are those with an underscore, which `test_private_names_are_used_in_the_seam_alone`
finds, and those without an underscore and without documentation, which are listed here. After an
upgrade that changes one, a test fails and shows its name.
"""

import ast
import inspect
import runpy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.autograd import Variable
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.fsdp._fully_shard._fsdp_param_group import (
    FSDPParamGroup,
    RegisterPostBackwardFunction,
)
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.nn.parallel import DistributedDataParallel

from scmoe.lightning.strategy import ExpertParallelStrategy
from scmoe.parallel import torch_seam

ROOT = Path(__file__).parents[1]

SIGNATURES = {  # name: its owner, its parameters
    "_set_params_and_buffers_to_ignore_for_model": (
        DistributedDataParallel,
        ["module", "params_and_buffers_to_ignore"],
    ),
    "_broadcast_sigterm_tensor": (_TrainingEpochLoop, ["self"]),
    "_should_check_val_fx": (_TrainingEpochLoop, ["self", "data_fetcher"]),
    "_after_closure": (Precision, ["self", "model", "optimizer"]),
    "_save_checkpoint": (ModelCheckpoint, ["self", "trainer", "filepath"]),
    "_should_skip_saving_checkpoint": (ModelCheckpoint, ["self", "trainer"]),
    "_register_signal": (_SignalConnector, ["signum", "handlers"]),
    "_slurm_sigusr_handler_fn": (_SignalConnector, ["self", "signum", "_"]),
    "_link_checkpoint": (ModelCheckpoint, ["trainer", "filepath", "linkpath"]),
    "_register_ddp_hooks": (DDPStrategy, ["self"]),
    "dump_checkpoint": (_CheckpointConnector, ["self", "weights_only"]),
    "_get_train_description": (RichProgressBar, ["self", "current_epoch"]),
    "get_extra_results": (_MultiProcessingLauncher, ["self", "trainer"]),
    "update_main_process_results": (_MultiProcessingLauncher, ["self", "trainer", "extra"]),
    "_apply": (nn.Module, ["self", "fn", "recurse"]),
}
OTHERS = {
    *("_ddp_params_and_buffers_to_ignore", "_last_global_step_saved", "_restarting"),
    *("_batches_that_stepped", "_signal_connector", "_checkpoint_connector", "_data_fetcher"),
    # test_from_python.py and test_launch.py use them
    *("_IS_INTERACTIVE", "_MultiProcessingLauncher", "_SubprocessScriptLauncher", "_start_method"),
    *("_execution_engine", "_compiled_call_impl", "_ddp_kwargs"),
    *("_fully_shard", "_fsdp_common", "_get_fsdp_state", "_fsdp_param_groups"),
    *("_set_unshard_async_op", "_training_state"),
    *("_dynamo", "_timeout", "_profiler_enabled", "_set_pg_timeout"),
    "_fingerprint",  # Hugging Face data sets have it
    # transformers marks weights that it has read; tests/weights/test_hf_folder.py holds it
    "_is_hf_initialized",
    # of transformers' configs; tests/test_hf.py holds it
    "_attn_implementation",
    *("_forward_hooks", "_forward_pre_hooks"),
}
# What fake tensors, their modes and their groups are called. test_counted_step.py uses each of the
# first file, test_operator_costs.py those of the second.
COUNTED = {
    "scmoe/predict/counted_step.py": {
        *("_subclasses", "_internal", "_guards", "_python_dispatch", "_cdata"),
        *(
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        ),
    },
    "scmoe/predict/operator_costs.py": {*("_cdata", "_schema", "_to_copy")},
}
OTHERS |= set().union(*COUNTED.values())
UNDOCUMENTED = {  # undocumented names without an underscore
    *("FSDPMeshInfo", "HSDPMeshInfo", "ShardPlacementResult", "TrainingState"),
    *("epoch_loop", "val_loop", "batch_progress", "TrainerStatus", "procs", "rank_zero_only"),
}
PYTHONS = {"_exit", "_fields", "_getframe", "_replace"}
SEAMS = ("scmoe/lightning/seam/", "scmoe/parallel/torch_seam.py")
ELSEWHERE = {(path, name) for path, names in COUNTED.items() for name in names}
ELSEWHERE |= {("datamodules/documents.py", "_fingerprint")}
ELSEWHERE |= {("scmoe/runs/hf_base.py", "_is_hf_initialized"), ("scmoe/moe/router.py", "_apply")}
ELSEWHERE |= {
    ("scmoe/moe/operators.py", "_profiler_enabled"),
    ("scmoe/runs/hf_base.py", "_attn_implementation"),
}
ELSEWHERE |= {("scmoe/blocks/latent.py", name) for name in ("_forward_hooks", "_forward_pre_hooks")}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    owner, parameters = SIGNATURES[name]
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_the_others_exist():
    assert ModelCheckpoint()._last_global_step_saved == 0
    assert "if self._restarting:" in inspect.getsource(BaseFinetuning.on_fit_start)
    assert (
        "self._link_checkpoint(trainer, self._last_checkpoint_saved, filepath)"
        in inspect.getsource(ModelCheckpoint)
    )
    assert "self.file_exists(filepath, trainer)" in inspect.getsource(ModelCheckpoint)
    assert "not self._has_already_handler(sigusr)" in inspect.getsource(_SignalConnector)
    assert "self._last_global_step_saved == trainer.global_step" in inspect.getsource(
        ModelCheckpoint
    )
    assert isinstance(Trainer(logger=False, accelerator="cpu")._signal_connector, _SignalConnector)
    assert inspect.getsource(_SignalConnector).count("signal.signal(") == 1, (
        "only _register_signal sets handlers"
    )
    assert "_batches_that_stepped" in inspect.getsource(_TrainingEpochLoop.on_load_checkpoint)
    assert hasattr(nn.Module(), "_compiled_call_impl")
    assert not nn.Module()._forward_hooks and not nn.Module()._forward_pre_hooks
    assert torch.autograd._profiler_enabled() is False
    assert torch._dynamo.config.recompile_limit >= 8
    assert callable(Variable._execution_engine.queue_callback)
    assert rank_zero_only.rank == 0, "known before a Trainer exists"
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(
        DistributedDataParallel.__init__
    )
    assert DDPStrategy(bucket_cap_mb=3.0)._ddp_kwargs == {"bucket_cap_mb": 3.0}
    assert "if backend_options._timeout != " in inspect.getsource(distributed_c10d), (
        "torch warns of another timeout"
    )
    assert "**self._ddp_kwargs" in inspect.getsource(DDPStrategy._setup_model)


def test_fsdp_places_parameters_by_process_group_and_reads_a_groups_policy_late():
    """`split_over` and `gather_as_kept` rely on this."""
    for kind in (FSDPMeshInfo, HSDPMeshInfo):
        assert list(inspect.signature(kind).parameters)[:3] == [
            "mesh",
            "shard_mesh_dim",
            "replicate_mesh_dim",
        ]
    assert list(inspect.signature(ShardPlacementResult).parameters) == ["placement", "mesh_info"]
    assert "self._init_mp_dtypes()" in inspect.getsource(FSDPParamGroup.lazy_init)
    read = inspect.getsource(FSDPParamGroup._init_mp_dtypes)
    assert any(
        f"fsdp_param.init_dtype_attrs({owner}.mp_policy)" in read
        for owner in ("self", "fsdp_param")
    )
    unit = FSDPState()
    assert unit._fsdp_param_groups == [] and callable(FSDPModule._get_fsdp_state)


def test_fsdp_gathers_in_the_background():
    """`gather_in_background` relies on this."""
    assert list(inspect.signature(FSDPModule._set_unshard_async_op).parameters) == [
        "self",
        "async_op",
    ]
    assert "self.unshard(self.unshard_async_op)" in inspect.getsource(FSDPParamGroup.pre_forward)


def test_fsdp_calls_a_group_by_its_attributes():
    """`intercept` relies on this."""
    assert "fsdp_param_group.pre_forward(module, args, kwargs)" in inspect.getsource(
        FSDPState._pre_forward
    )
    assert "fsdp_param_group.post_forward(module, input, output)" in inspect.getsource(
        FSDPState._post_forward
    )
    assert "param_group.post_backward()" in inspect.getsource(RegisterPostBackwardFunction.backward)
    assert "return args, kwargs" in inspect.getsource(FSDPParamGroup._register_post_backward_hook)


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


NAMING = (ast.Attribute, ast.ImportFrom, ast.Call, ast.FunctionDef, ast.ClassDef, ast.Assign)


def names_of(node):
    """Return the names that a node uses: an attribute, imported names, or the text in a call of
    getattr or hasattr."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.ImportFrom):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id.endswith("attr")
    ):
        return [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
    return []


def defined_by(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return (
        {node.attr}
        if stored and isinstance(node.value, ast.Name) and node.value.id == "self"
        else set()
    )


def test_private_names_are_used_in_the_seam_alone():
    """A name that is defined in this repository is not foreign, unless it overrides one of
    Lightning or torch."""
    paths = [
        path
        for room in ("scmoe", "datamodules", "experiments")
        for path in (ROOT / room).rglob("*.py")
    ]
    nodes = [
        (path.relative_to(ROOT).as_posix(), node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, NAMING)
    ]
    own = set().union(*(defined_by(node) for _, node in nodes)) - SIGNATURES.keys() - OTHERS
    used = {(path, name) for path, node in nodes for name in names_of(node)}
    used |= {(path, name) for path, node in nodes for name in defined_by(node) & SIGNATURES.keys()}
    foreign = {
        (path, name)
        for path, name in used
        if (is_private(name) and name not in own) or name in UNDOCUMENTED
    }
    assert {name for _, name in foreign} <= SIGNATURES.keys() | OTHERS | UNDOCUMENTED | PYTHONS, (
        "unknown to this test"
    )
    assert {
        (path, name)
        for path, name in foreign - ELSEWHERE
        if not path.startswith(SEAMS) and name not in PYTHONS
    } == set()


# ---------------------------------------------------------------------- without an underscore


def test_progress_of_lightnings_loops():
    """The loops count where a run is in a step, and an interrupted validation can be reset and
    repeated."""
    trainer = Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    loop = trainer.fit_loop.epoch_loop
    for progress in (loop.batch_progress, loop.val_loop.batch_progress):
        assert (progress.current.ready, progress.current.processed, progress.is_last_batch) == (
            0,
            0,
            False,
        )
        progress.increment_ready()
        progress.increment_started()
        assert (progress.current.ready, progress.current.started, progress.current.processed) == (
            1,
            1,
            0,
        )
        progress.total.reset_on_restart()
        progress.reset()
        assert (progress.current.ready, progress.total.ready) == (0, 0)
    assert loop.batch_idx == -1, "batch_idx is ready - 1"
    assert trainer.fit_loop._data_fetcher is None, "it has one while it runs"
    assert (trainer.validating, trainer.sanity_checking, trainer.checkpoint_callbacks) == (
        False,
        False,
        [],
    )
    assert (
        trainer.state.fn is None
        and TrainerFn.FITTING == "fit"
        and TrainerStatus.INTERRUPTED in TrainerStatus
    )


def test_the_launcher_keeps_its_processes():
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    assert launcher.procs == []
    assert inspect.signature(launcher.launch).parameters.keys() >= {"function", "trainer"}
    assert "self.procs.append(" in inspect.getsource(_SubprocessScriptLauncher)


def test_hooks_of_a_strategy():
    """Lightning calls the overridden hooks by these names, and its own hooks at a start or an end
    do nothing."""
    bases = ExpertParallelStrategy.__mro__[: ExpertParallelStrategy.__mro__.index(DDPStrategy)]
    overridden = {name for base in bases for name in vars(base)}
    stages = {
        f"on_{stage}_{end}"
        for stage in ("validation", "test", "predict")
        for end in ("start", "end")
    }
    hooks = {
        *("on_train_start", "on_train_batch_start", "on_exception"),
        *("setup_environment", "setup", "model_to_device", "configure_ddp", "teardown"),
        *("backward", "block_backward_sync", "barrier", "broadcast", "reduce"),
        *("validation_step", "test_step", "predict_step"),
        *(
            "save_checkpoint",
            "remove_checkpoint",
            "load_checkpoint",
            "load_model_state_dict",
            "optimizer_state",
        ),
        *(
            "lightning_module_state_dict",
            "restore_checkpoint_after_setup",
            "lightning_restore_optimizer",
        ),
        *("is_global_zero", "precision_plugin"),
    }
    assert stages | hooks <= overridden
    assert {name for name in overridden if name.startswith("on_")} <= stages | hooks
    assert not [name for name in stages | hooks if not hasattr(DDPStrategy, name)]
    assert DDPStrategy().lightning_restore_optimizer is True
    for name in stages | {"on_train_start", "on_train_batch_start"}:
        assert inspect.getsource(getattr(DDPStrategy, name)).split('"""')[-1].strip() == "pass"


def test_a_precision_plugin_clips_by_these_names():
    clip = ["self", "optimizer", "clip_val", "gradient_clip_algorithm"]
    for plugin in (Precision, MixedPrecision):
        assert list(inspect.signature(plugin.clip_gradients).parameters) == clip
        assert list(inspect.signature(plugin.clip_grad_by_norm).parameters) == clip[:-1]
        assert list(inspect.signature(plugin.pre_backward).parameters) == [
            "self",
            "tensor",
            "module",
        ]
    assert "self._after_closure(model, optimizer)" in inspect.getsource(Precision._wrap_closure)
    calls_it = "self.precision_plugin.pre_backward(closure_loss, self.lightning_module)"
    assert calls_it in inspect.getsource(DDPStrategy.backward)


def test_whole_weights_need_no_name_that_torch_2_11_lacks(monkeypatch):
    monkeypatch.delattr(_fsdp_common, "ShardPlacementResult")
    seam = runpy.run_path(str(torch_seam.__file__))
    with pytest.raises(RuntimeError, match=r"split dense weights need 2\.12 or later"):
        seam["split_over"](None, 0)
