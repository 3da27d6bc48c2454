"""Clips by one global gradient norm, and lets no update pass that the guard has not checked
(faults 22, 27).

Lightning's precision plugins clip by the norm of what a rank holds. It differs from rank to rank,
because each holds other experts. They also check nothing if nothing is clipped. Left out: a torch
optimizer that is stepped without Lightning (`use_pl_optimizer=False`).
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from scmoe.lightning.seam.loops import original_after_closure, replace_after_closure
from scmoe.lightning.unsupported import check_optimization, check_precision
from scmoe.parallel.mesh import Mesh, expert_parameters
from scmoe.parallel.update.guard import Guard, clip_grad_norm


class GuardedUpdate:
    """Replaces the functions of a precision plugin that run between backward and update.

    The plugin's `clip_gradients` then returns the global gradient norm.
    """

    def __init__(self, plugin: Any, module: nn.Module, mesh: Mesh) -> None:
        check_precision(plugin)
        check_optimization(module, mesh)
        self.plugin = plugin
        self.original = type(plugin)
        self.module = module
        self.mesh = mesh
        self.guard = Guard(module)
        self.is_checked = False  # this update's gradients
        plugin.pre_backward = self.before_backward
        plugin.clip_gradients = self.clip
        plugin.clip_grad_by_norm = self.clip_by_norm
        replace_after_closure(plugin, self.after_backward)

    def before_backward(self, loss: Tensor, module: Any) -> Tensor:
        self.guard.note_loss(loss)
        return self.original.pre_backward(self.plugin, loss, module)

    def after_backward(self, module: Any, optimizer: Optimizer) -> None:
        """Let the module clip, and check the gradients, before this optimizer's update.

        Raises FloatingPointError on every rank if a gradient is not finite, and RuntimeError if the
        module clips in another way.
        """
        self.is_checked = False
        original_after_closure(self.plugin, module, optimizer)
        if not module.automatic_optimization:  # such a module may clip whenever it likes
            self.clip_by_norm(optimizer, None)
        elif not self.is_checked:
            raise RuntimeError(
                f"{type(module).__name__}.configure_gradient_clipping did not call"
                " self.clip_gradients, so no update was made: each rank would clip by a norm of"
                " its own, and a NaN would pass; call self.clip_gradients(optimizer,"
                " gradient_clip_val, gradient_clip_algorithm) there"
            )

    def clip(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm"
    ) -> Tensor:
        """Clip the gradients, check them, and return their global norm before that.

        Also check gradients that are clipped by value, or not at all. The plugin's own
        `clip_gradients` is not used: in bf16-mixed it refuses fused optimizers, because they
        unscale gradients only later. But gradients are scaled in float16 only.
        """
        if clip_val > 0 and gradient_clip_algorithm == "norm":
            return self.clip_by_norm(optimizer, clip_val)
        norm = self.clip_by_norm(optimizer, None)
        if clip_val > 0:
            self.plugin.clip_grad_by_value(optimizer, clip_val)
        return norm

    def clip_by_norm(self, optimizer: Optimizer, clip_val: float | None) -> Tensor:
        """Compute the global norm, clip by it, check it and return it.

        clip_val: None changes no gradient.
        """
        # the norm's last bits depend on the order
        order = {p: i for i, p in enumerate(self.module.parameters())}
        held = (p for group in optimizer.param_groups for p in group["params"])
        shards = {p for _, p in expert_parameters(self.module)}
        parameters = sorted(held, key=lambda p: order.get(p, len(order)))
        norm = clip_grad_norm(parameters, shards, clip_val, self.mesh, self.guard.loss_as_zero())
        self.guard.check(norm, self.mesh)
        self.is_checked = True
        return norm

    def remove(self) -> None:
        self.guard.remove()
        for name in ("pre_backward", "clip_gradients", "clip_grad_by_norm"):
            vars(self.plugin).pop(name, None)
        replace_after_closure(self.plugin, None)


def guard_updates(plugin: Any, module: nn.Module, mesh: Mesh) -> GuardedUpdate:
    """Return the GuardedUpdate of `module` in this precision plugin.

    The first call for a module installs it.
    """
    installed = plugin.clip_gradients.__self__
    if isinstance(installed, GuardedUpdate) and installed.module is module:
        return installed
    return GuardedUpdate(plugin, module, mesh)
