"""What the Strategy does where Lightning saves, removes or reads a checkpoint.

A save inside a step is postponed to its end, as gradients are in no checkpoint; one outside of a
training is completed at once.
"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from scmoe.lightning.seam import loops, saves
from scmoe.parallel.checkpoint.of_ranks import Key
from scmoe.parallel.checkpoint.remote import located, on_each_machine
from scmoe.parallel.checkpoint.saving import Checkpoints
from scmoe.parallel.checkpoint.state import own_part, tied_weights, to_text
from scmoe.parallel.mesh import Mesh

READ_IN_PLACE = (
    "on_load_checkpoint reads checkpoint[{!r}], which ExpertParallelStrategy does not give: each"
    " rank has read its part of the tensors in place before the hook. Change the module's weights"
    " in the hook instead, or set strict_loading=False to load a checkpoint that lacks some of them"
)


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


def refuse_checkpoint_io(strategy: Any) -> None:
    """Raise ValueError for a user's CheckpointIO: nothing would be saved or read through it."""
    plugin = type(strategy.checkpoint_io)
    if plugin is not TorchCheckpointIO:  # Lightning's default
        raise ValueError(
            f"the plugin {plugin.__name__} is not supported: each rank writes files of its own."
            " Leave it out; ExpertParallelStrategy(async_checkpoint=True) saves in the background"
        )


def refuse_save(mesh: Mesh, storage_options: Any = None) -> None:
    """Raise ValueError for options of a storage, RuntimeError where this process is no rank."""
    if storage_options is not None:
        raise ValueError(
            "storage_options is not supported: leave it out, and set the options of a remote"
            " storage in fsspec's configuration"
        )
    if mesh.device_mesh is None:
        raise RuntimeError(
            "no checkpoint can be saved here: the ranks, which hold the experts, do not exist"
            " before fit, and end with it after spawn or fork. Save inside fit, for example"
            " with ModelCheckpoint"
        )


def refuse_load_without_ranks(mesh: Mesh) -> None:
    """Raise RuntimeError where this process is no rank."""
    if mesh.device_mesh is None:
        raise RuntimeError(
            "no checkpoint can be loaded here: the ranks, which hold the experts, do not exist"
            " before fit, validate, test or predict. Give ckpt_path to one of them, or read it"
            " in one process with scmoe.load_checkpoint"
        )


def warn_of_skipped_save() -> None:
    """Warn that a rank that has raised saves nothing."""
    warnings.warn(
        "no checkpoint is saved after an exception: saving takes all ranks, and this rank"
        " does not know where the others are",
        stacklevel=2,
    )


def save_or_postpone(
    path: Any,
    state: dict[str, Any],
    module: Any,
    checkpoints: Checkpoints,
    mesh: Mesh,
    takes_steps: bool,
) -> None:
    """Save what the Trainer gives, or note that it is saved at the end of the step. Every rank must
    call it.

    path: as the Trainer gives it.

    takes_steps: a training goes on, so that a save may be completed later.
    """
    if loops.accumulated_batches(module.trainer) and takes_steps:
        rank_zero_warn(
            "a checkpoint inside a step is saved at its end, as gradients are in no checkpoint"
        )
        checkpoints.postponed[located(path)] = "optimizer_states" not in state
        return
    written = own_part(module, state["state_dict"], mesh)
    checkpoints.save(
        located(path), state | {"state_dict": written, "tied_weights": tied_weights(module)}, module
    )
    if not takes_steps:  # else nothing would complete it
        checkpoints.finish()


def read_in_place(
    path: Any, trainer: Any, checkpoints: Checkpoints, optimizers: Sequence[Optimizer]
) -> dict[str, Any]:
    """Read weights and optimizer state in place and return the rest. Every rank must call it.

    ValueError: a callback or the data module has state there that this rank cannot read.
    """
    module = trainer.lightning_module
    checkpoints.finish()  # it may be the one that is read
    with on_each_machine(located(path), checkpoints.mesh) as folder:
        if optimizers:
            saves.make_groups_of_finetuning(trainer, folder)
        rest, reasons = checkpoints.load(folder, module, optimizers, module.strict_loading)
    restored: set[Key] = {("callbacks", callback.state_key) for callback in trainer.callbacks}
    restored.add((type(trainer.datamodule).__qualname__,))
    for key, reason in reasons.items():
        if key in restored:
            raise ValueError(f"{path}: {reason}")
        rank_zero_warn(f"not loaded: {reason}")
    lacking = {key[0]: reason for key, reason in reasons.items() if len(key) == 1}
    return ForHooks(rest, lacking)


class ForHooks(dict[str, Any]):
    """What `on_load_checkpoint` gets. It lacks what ranks read in place, and what cannot be read in
    this layout; reading that by its key is an error that says so.

    lacking: why it lacks a key.
    """

    def __init__(self, content: dict[str, Any], lacking: dict[str, str]) -> None:
        super().__init__(content)
        self.lacking = lacking

    def __missing__(self, key: str) -> Any:
        if key in ("state_dict", "optimizer_states"):
            raise ValueError(READ_IN_PLACE.format(key))
        raise ValueError(self.lacking[key]) if key in self.lacking else KeyError(key)


def remove(path: Any, trainer: Any, checkpoints: Checkpoints) -> None:
    """Remove a checkpoint in a folder of this Trainer; warn of another one. Every rank must call
    it."""
    folder = located(path)
    if saves.is_of_trainer(folder, trainer):
        checkpoints.remove(folder)
    else:
        rank_zero_warn(
            f"{path} is not removed: it is outside the folders of this Trainer's checkpoints"
        )


class SavePostponed(Callback):
    """Saves what was requested inside a step, once the step is taken or training ends inside it.

    After the first step it also makes what a checkpoint would hold, without writing it, so that
    something that cannot be saved ends the run then and not hours later. It does not do so without
    a callback that saves.
    """

    def __init__(self) -> None:
        self.has_checked = False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not loops.accumulated_batches(trainer):
            self.check(trainer)
            self.save(trainer)

    def check(self, trainer: Any) -> None:
        if trainer.checkpoint_callbacks and not self.has_checked:
            self.has_checked = True
            weights_only = all(
                getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks
            )
            saved = saves.what_is_saved(trainer, weights_only)
            trainer.strategy.checkpoints.check(saved, trainer.lightning_module)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        if loops.accumulated_batches(trainer) and trainer.strategy.checkpoints.postponed:
            rank_zero_warn(
                "training ended inside a step: checkpoints hold the step before, without its"
                " gradients"
            )
        trainer.strategy.in_training = False
        self.save(trainer)

    def save(self, trainer: Any) -> None:
        postponed = trainer.strategy.checkpoints.postponed
        while postponed:
            path = next(iter(postponed))
            trainer.save_checkpoint(str(path), postponed.pop(path))
