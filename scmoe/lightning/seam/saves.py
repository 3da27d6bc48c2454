"""When Lightning's callbacks save, what they keep, and what they read back in a resumed run."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from scmoe.lightning.seam import loops
from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import read_meta
from scmoe.parallel.checkpoint.remote import Place, located
from scmoe.parallel.checkpoint.saving import Checkpoints


def what_is_saved(trainer: Any, weights_only: bool) -> dict[str, Any]:
    """Return the dictionary that the Trainer gives to a strategy's save_checkpoint.

    Every hook of a save is called.
    """
    saved: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    return saved


def mark_step_as_saved(trainer: Any) -> None:
    """Let every ModelCheckpoint know that the current step is saved already.

    A resumed ModelCheckpoint does not know. It would save again after the first batch, which with
    accumulation lies in the middle of a step, and overwrite the checkpoint that the run was resumed
    from.
    """
    for callback in trainer.checkpoint_callbacks:
        if hasattr(callback, "_last_global_step_saved"):
            callback._last_global_step_saved = trainer.global_step


def make_groups_of_finetuning(trainer: Any, checkpoint: Path) -> None:
    """Give each BaseFinetuning its saved state and let it make the parameter groups of that moment.

    Lightning lets it do so in `on_fit_start`, which comes before a checkpoint is read under this
    Strategy.
    """
    finetuning = [
        callback for callback in trainer.callbacks if isinstance(callback, BaseFinetuning)
    ]
    if not finetuning:
        return
    durable.verify(checkpoint, durable.UNREAD)
    states = read_meta(checkpoint).get("callbacks", {})
    for callback in finetuning:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])
            BaseFinetuning.on_fit_start(callback, trainer, trainer.lightning_module)


def end_restart_of_finetuning(trainer: Any) -> None:
    """Keep a further fit from making these groups again.

    Lightning gives the callbacks their state a second time.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, BaseFinetuning):
            callback._restarting = False


def await_saves(trainer: Any, checkpoints: Checkpoints) -> Callable[[], None]:
    """Let ModelCheckpoints know of checkpoints that are not there yet.

    They give their names to no other checkpoint, and link `last.ckpt` to one only when it is there.
    Return the function that undoes this.
    """
    callbacks: list[Any] = [
        c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)
    ]
    for callback in callbacks:
        # no function in a function: a Trainer can be pickled
        callback.file_exists = partial(_exists_or_comes, callback, checkpoints)
        callback._link_checkpoint = partial(_link_when_saved, callback, checkpoints)

    def undo() -> None:
        for callback in callbacks:
            vars(callback).pop("file_exists", None)
            vars(callback).pop("_link_checkpoint", None)

    return undo


def _exists_or_comes(callback: Any, checkpoints: Checkpoints, filepath: Any, trainer: Any) -> bool:
    folder = located(filepath)
    if checkpoints.is_coming(folder):
        return True
    if isinstance(folder, Path):
        return bool(type(callback).file_exists(callback, filepath, trainer))
    # Lightning's own finds what a killed save has left
    exists = trainer.is_global_zero and folder.exists()
    return bool(trainer.strategy.reduce_boolean_decision(exists, all=False))


def _link_when_saved(
    callback: Any, checkpoints: Checkpoints, trainer: Any, filepath: str, linkpath: str
) -> None:
    link = partial(type(callback)._link_checkpoint, trainer, filepath, linkpath)
    if checkpoints.is_coming(Path(filepath)):
        checkpoints.when_saved[Path(filepath)] = link
    else:
        link()


def is_of_trainer(path: Place, trainer: Any) -> bool:
    """Return whether a checkpoint is in a folder of this Trainer.

    Its path may be from a file of another person.
    """
    folders = [
        folder for c in trainer.checkpoint_callbacks if (folder := getattr(c, "dirpath", None))
    ]
    if not isinstance(path, Path):
        parent = path.url.rpartition("/")[0]
        return parent == trainer.default_root_dir or any(path.is_in(str(f)) for f in folders)
    inside = any(
        Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(f)) for f in folders
    )
    of_tuner = path.parent == Path(trainer.default_root_dir)
    return path.name != ".." and (inside or of_tuner)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoint alone, as `step=N.ckpt`.

    It saves every n-th step, at a stop and at the end of training. Where a validation follows the
    step, it saves as that begins, so that an error in it loses no step: a run that resumes from
    this checkpoint does the validation. Lightning's own saves nothing at the end, and leaves the
    checkpoint from which a run was resumed. With another save_top_k, -1 or 0, this one keeps all
    checkpoints or makes none.
    """

    def __init__(self, folder: Path | None, every_n_steps: int) -> None:
        super().__init__(
            folder,
            "{step}",
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,  # a damaged checkpoint of this name is replaced
        )
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # a resumed run has its checkpoint

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not loops.validates_next(trainer):
            self._save_if_due(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        with loops.leaving_validation(trainer):
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: Any) -> None:
        is_due = self.save_top_k and trainer.global_step % self.every_n_steps == 0
        if is_due and not self._should_skip_saving_checkpoint(trainer):
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        """Save the current step. Every rank must call it."""
        assert self.dirpath is not None, "the Trainer has set it"
        self.best_model_path = str(Path(self.dirpath) / f"step={trainer.global_step}.ckpt")
        self._save_checkpoint(trainer, self.best_model_path)

    def save_at_stop(self, trainer: Any) -> None:
        """Save the current step, unless that was done as the running validation began. Every rank
        must call it."""
        if not (trainer.validating and self._is_saved(trainer)):
            self.save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.save_top_k and not self._is_saved(trainer):
            self.save(trainer)

    def _is_saved(self, trainer: Any) -> bool:
        return bool(self._last_global_step_saved == trainer.global_step)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        for path in Path(filepath).parent.glob("step=*.ckpt") if self.save_top_k == 1 else ():
            step = re.fullmatch(r"step=(\d+)(-v\d+)?\.ckpt", path.name)
            if step and int(step[1]) < trainer.global_step:
                trainer.strategy.remove_checkpoint(path)  # once the new one is complete


class BestCheckpoints(ModelCheckpoint):
    """Keeps the checkpoints of the best validations, as `best-step=N.ckpt`.

    Lightning's own, in a resumed run, forgets them if the run's directory was moved, counts those
    that are gone, and never removes one if fewer are kept than before.
    """

    def __init__(self, folder: Path | None, monitor: str, mode: str, kept: int) -> None:
        super().__init__(
            folder,
            "best-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=kept,
            enable_version_counter=False,  # as of LastCheckpoint
        )

    @property
    def state_key(self) -> str:
        return as_of_base(self, super().state_key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Of the checkpoints in the loaded state, keep the best that are in this folder."""
        super().on_train_start(trainer, pl_module)
        if not self.best_k_models:
            return
        assert self.dirpath is not None, "the Trainer has set it"
        scores = {
            str(Path(self.dirpath) / Path(path).name): score
            for path, score in self.best_k_models.items()
        }
        best_first = sorted(scores, key=scores.__getitem__, reverse=self.mode == "max")
        # as rank 0 sees it
        there = trainer.strategy.broadcast([path for path in best_first if Path(path).exists()])
        kept = there[: self.save_top_k]
        self.best_k_models = {path: scores[path] for path in kept}
        self.best_model_path, self.kth_best_model_path = (kept[0], kept[-1]) if kept else ("", "")
        self.best_model_score = scores.get(self.best_model_path)
        self.kth_value = scores.get(self.kth_best_model_path, self.kth_value)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        names = {Path(path).name for path in self.best_k_models}
        for path in Path(filepath).parent.glob("best-step=*.ckpt"):
            step = re.fullmatch(r"best-step=(\d+)(-v\d+)?\.ckpt", path.name)
            if step and int(step[1]) < trainer.global_step and path.name not in names:
                trainer.strategy.remove_checkpoint(path)


class Patience(EarlyStopping):
    """EarlyStopping whose patience is that of the configuration.

    Lightning's own takes it from the checkpoint in a resumed run.
    """

    @property
    def state_key(self) -> str:
        return as_of_base(self, super().state_key)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED  # of this part of the run


def as_of_base(callback: ModelCheckpoint | EarlyStopping, key: str) -> str:
    """Return a callback's key with the name of Lightning's class.

    Checkpoints of all versions have its state there.
    """
    return key.replace(type(callback).__qualname__, type(callback).__mro__[1].__qualname__, 1)
