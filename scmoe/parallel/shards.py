"""Finds the sharded parameters: those of `Experts` modules."""

from collections.abc import Iterator

from torch import nn

from scmoe.moe.experts import Experts


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield names (from `module`) and tensors of all expert shards. The module's class marks them: unlike an attribute
    on a tensor, it survives deepcopy, to_empty and compile."""
    for prefix, child in module.named_modules():
        if isinstance(child, Experts):
            for name, parameter in child.named_parameters(recurse=False):
                yield f"{prefix}.{name}" if prefix else name, parameter
