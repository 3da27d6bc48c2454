"""One global gradient norm, and a NaN or Inf in it stops every rank before the update (fault 27).
The error names the layer and the rank where it arose.

The norm is bit-identical on all ranks, so all ranks see at the same time that it is not finite,
without another message. They search for the origin only in this case. By then the reduction has
spread the NaN to all ranks, so every module records the sum of its output and the sum of its
output's gradient in each step: one small reduction each, which nothing waits for. Left out: modules
inside a compiled one; the error then names a module around it, or a gradient.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scmoe.parallel.dense.sharded import copies, local
from scmoe.parallel.mesh import Mesh
from scmoe.parallel.torch_seam import is_compiled


class ModuleWatch:
    """A forward hook that notes the output of a module, and the gradient of it, under a name.

    A copy of the module, or what is read from a pickle of it, is not watched.
    """

    def __init__(self, guard: "Guard", name: str) -> None:
        self.guard, self.name = guard, name

    def __call__(self, _: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled():
            self.guard.note(f"output of {self.name}", output.detach().sum())
            # on a weight that is returned as it is, hooks of all steps would stay
            if not output.is_leaf:
                output.register_hook(self._note_gradient)

    def _note_gradient(self, gradient: Tensor) -> None:
        self.guard.note(f"gradient into {self.name}", gradient.sum())

    def __reduce__(self) -> Any:
        return Unwatched, ()


class Unwatched:
    """A forward hook that does nothing."""

    def __call__(self, *_: Any) -> None:
        pass


class Guard:
    """Watches those modules inside `module` that have parameters of their own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.trace: dict[str, Tensor] = {}  # by what was computed: the sum of its entries
        compiled = {
            inner for child in module.modules() if is_compiled(child) for inner in child.modules()
        }
        self.hooks = [
            child.register_forward_hook(ModuleWatch(self, name or type(child).__name__))
            for name, child in module.named_modules()
            if next(child.parameters(recurse=False), None) is not None and child not in compiled
        ]

    def note(self, name: str, total: Tensor) -> None:
        """Keep one number a name, however many batches there are.

        What was not finite once stays so.
        """
        self.trace[name] = total if name not in self.trace else self.trace[name] * 0 + total

    def note_loss(self, loss: Tensor) -> None:
        """Keep the loss. It must be called for each batch, before its backward."""
        self.note("loss", loss.detach().sum())

    def loss_as_zero(self) -> Tensor | float:
        """Return 0, or NaN if a loss since the last check was not finite.

        It is added to a sum over ranks.
        """
        return self.trace["loss"] * 0 if "loss" in self.trace else 0.0

    def check(self, norm: Tensor, mesh: Mesh) -> None:
        """Raise FloatingPointError on every rank if the global gradient norm is not finite."""
        if torch.isfinite(norm):
            self.trace.clear()
            return
        names: list[Any] = [self._first()]
        if mesh.world_size > 1:
            names = [None] * mesh.world_size
            dist.all_gather_object(names, self._first(), group=mesh.control_group)
        arose = {rank: name for rank, name in enumerate(names) if name is not None}
        results = {rank: name for rank, name in arose.items() if not name.startswith("gradient")}
        arose = results or arose
        where = (
            "; ".join(f"rank {rank}: {name}" for rank, name in arose.items())
            or "only the sum over ranks"
        )
        raise FloatingPointError(
            f"gradient norm is {norm.item()}, no update was made; first not finite: {where}"
        )

    def _first(self) -> str | None:
        """Return the name of the first value on this rank that is not finite; None: all are.

        Weights are searched first, then the noted results in their order, then gradients.
        """
        for name, p in self.module.named_parameters():
            if not local(p).isfinite().all():
                return f"weight {name}"
        for name, total in self.trace.items():
            if not total.isfinite():
                return name
        for name, p in self.module.named_parameters():
            if p.grad is not None and not local(p.grad).isfinite().all():
                return f"gradient of {name}"
        return None

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    shards: set[nn.Parameter],
    max_norm: float | None,
    mesh: Mesh,
    zero: Tensor | float = 0.0,
) -> Tensor:
    """Scale all gradients so that their global norm is at most max_norm.

    Return the norm before that. max_norm: None scales nothing.

    norm² = |replicated|² + (sum over ranks of |parts|² / number of ranks with the same part). One
    sum over all ranks makes the norm bit-identical on all ranks; if it were only close, replicas
    would drift apart. zero: `Guard.loss_as_zero()`; a NaN on one rank makes the norm NaN on all
    ranks.
    """
    parameters = list(parameters)
    device = parameters[0].device if parameters else torch.as_tensor(zero).device
    of_parts, of_replicated = squares(parameters, shards, mesh, device)
    norm = (mesh.sum_over_ranks(of_parts + zero) + of_replicated).sqrt()
    if max_norm is not None:
        split = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
        torch.nn.utils.clip_grads_with_norm_(
            (p for p in parameters if not isinstance(p.grad, DTensor)), max_norm, norm
        )
        for gradient in split:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def squares(
    parameters: Iterable[nn.Parameter], shards: set[nn.Parameter], mesh: Mesh, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return two squared norms of gradients.

    The first is of the parts that this rank holds, to be summed over all ranks; the second of what
    every rank holds whole. A part that several ranks hold counts once in the sum. shards: the
    experts.
    """
    replicated: list[Tensor] = []
    parts = defaultdict[int, list[Tensor]](list)  # by how many ranks hold the same
    for p in parameters:
        if isinstance(p.grad, DTensor):
            parts[copies(p.grad)].append(local(p.grad))
        elif p.grad is not None and p in shards:
            parts[mesh.edp_size].append(p.grad)
        elif p.grad is not None:
            replicated.append(p.grad.coalesce().values() if p.grad.is_sparse else p.grad)
    square = torch.zeros((), device=device)
    for holders, gradients in parts.items():
        square = square + total_norm(gradients, device).square() / holders
    return square, total_norm(replicated, device).square()


def total_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return the joint norm, on `device`, in 32 bits or more.

    So the root of its square is the norm again. Of an empty list torch returns a norm on the CPU,
    which NCCL refuses.
    """
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
    return norm if norm.dtype.itemsize > 2 else norm.float()
