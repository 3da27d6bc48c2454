"""What is checked, or said, once when the Trainer sets up a model and begins a fit."""

from contextlib import suppress
from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from scmoe.parallel.checkpoint.state import to_text
from scmoe.parallel.mesh import expert_parameters
from scmoe.parallel.update.wrap import Wrapped


def check_can_be_saved(trainer: Any) -> None:
    """Raise TypeError for what a checkpoint could not hold.

    Checked are hyper-parameters and the state of callbacks.
    """
    states: list[tuple[str, Any]] = []
    for holder in (trainer.lightning_module, trainer.datamodule):
        if holder is not None:
            states.append((f"a hyper-parameter of {type(holder).__name__}", holder.hparams))
    for callback in trainer.callbacks:
        with suppress(Exception):  # it may not have a state before the first step
            states.append(
                (f"the state of the callback {type(callback).__name__}", callback.state_dict())
            )
    for what, state in states:
        try:
            to_text(state)
        except TypeError as error:
            raise TypeError(
                f"{what} cannot be saved: {error}. Convert it, or leave it out"
            ) from error


def check_late_experts(module: Any, wrapped: Wrapped) -> None:
    """Raise ValueError for experts that were added after their gradients got a reducer."""
    known = {*wrapped.reducer.shards} if wrapped.reducer else set()
    for name, p in expert_parameters(module):
        if p.requires_grad and p not in known and not isinstance(p, DTensor):
            raise ValueError(
                f"{name} was added after fit had begun. Add experts in configure_model or setup"
            )


def explain_summary(trainer: Any, ep_size: int) -> None:
    """Say that Lightning's summary counts a part of the experts, where it is shown."""
    if ep_size > 1 and any(isinstance(callback, ModelSummary) for callback in trainer.callbacks):
        rank_zero_info(
            f"The model summary counts this rank's experts: 1 of {ep_size} parts of them."
        )
