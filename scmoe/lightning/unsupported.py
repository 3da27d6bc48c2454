"""What Lightning and torch offer, and ranks that hold different experts cannot honour."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim import LBFGS, Optimizer

from scmoe.parallel.mesh import Mesh, expert_parameters

# Their copy of the module would hold one rank's experts.
COPYING = (WeightAveraging, StochasticWeightAveraging)
# By name, as an import of torch.distributed.optim takes time.
MIXING = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer")


def check_precision(plugin: Any) -> None:
    """Raise ValueError for float16.

    Unscaled gradients vanish in it, and a scaler skips a step on one rank alone.
    """
    if plugin is not None and plugin.precision in ("16-true", "16-mixed"):
        allowed = "32-true, bf16-mixed, bf16-true, 64-true"
        raise ValueError(
            f"trainer.precision is {plugin.precision}, allowed: {allowed}; float16 has too small a"
            " range"
        )


def check_optimization(module: Any, mesh: Mesh) -> None:
    """Raise ValueError for a module that calls backward itself where dense weights are split.

    Its backward runs inside FSDP's outermost forward. Gradients of the weights outside of blocks
    would then be summed by chance only, and a second forward in the step would find split weights.
    """
    if mesh.dense_mesh is not None and not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} has automatic_optimization=False, which is not supported"
            " where dense weights are split. Use dense='replicated'"
        )


def check_optimizers(optimizers: Iterable[Optimizer], module: nn.Module, mesh: Mesh) -> None:
    """Raise ValueError for an optimizer that would mix the experts of ranks, or whose step depends
    on all weights of a rank where ranks hold different ones."""
    have_own_experts = mesh.ep_size > 1 and any(expert_parameters(module))
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if any(kind.__name__ in MIXING for kind in type(optimizer).__mro__):
            raise ValueError(
                f"the optimizer {name} is not supported: it sends weights from rank to rank, where"
                " experts differ, and checkpoints do not hold its state. Use the optimizer in it,"
                " with dense='sharded' where its moments must be split over ranks"
            )
        if isinstance(optimizer, LBFGS) and have_own_experts:
            raise ValueError(
                f"the optimizer {name} is not supported where ranks hold different experts: it"
                " computes one step of all weights of a rank, so other weights would differ from"
                " rank to rank. Use another optimizer, or ep_size=1"
            )


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Raise ValueError for a callback that averages weights in a copy of the module."""
    for callback in callbacks:
        if isinstance(callback, COPYING):
            raise ValueError(
                f"the callback {type(callback).__name__} keeps a copy of the module, which would"
                " hold one rank's experts alone. Leave it out, and average the weights of"
                " checkpoints instead"
            )
