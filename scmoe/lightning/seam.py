"""The only file that uses undocumented names of Lightning; each function says what it gives.
torch's: torch_seam.py.

An upgrade can rename or change any of them without notice, so tests/unit/test_private_names.py
checks each name and refuses its use elsewhere. `trainer` is always a Lightning Trainer, `plugin` a
precision plugin.
"""

import os
import re
import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from scmoe.parallel.checkpoint import durable
from scmoe.parallel.checkpoint.loading import read_meta
from scmoe.parallel.checkpoint.saving import Checkpoints

BAR = 10  # columns of the progress bar
WIDE = 120  # columns of a terminal that has room for all metrics on the bar's line


def is_fitting(trainer: Any) -> bool:
    """Return whether the Trainer runs `fit`, its validations and sanity check included."""
    return bool(trainer.state.fn == "fit")


def without_inference_mode(trainer: Any) -> None:
    """Let validation, test and prediction run under no_grad.

    In inference mode, which Lightning uses where the backend is not gloo, FSDP cannot gather
    weights.
    """
    # that of fit uses no_grad
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def was_interrupted(trainer: Any) -> bool:
    """Return whether the Trainer's run has ended with an exception on this rank."""
    return bool(trainer.state.status == TrainerStatus.INTERRUPTED)


def accumulated_batches(trainer: Any) -> int:
    """Return how many batches have left gradients that no update has used yet."""
    done = trainer.fit_loop.epoch_loop.batch_progress
    stepped = done.is_last_batch and done.current.processed == done.current.ready
    if not is_fitting(trainer) or stepped:
        return 0
    return int(done.current.processed % trainer.accumulate_grad_batches)


def restart_validation(trainer: Any) -> None:
    """Reset the progress of the running validation.

    A run that is resumed from a checkpoint saved now does all of it. A sanity check leaves no trace
    in a checkpoint.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    if is_fitting(trainer) and (trainer.validating or trainer.sanity_checking):
        progress.reset()
    if is_fitting(trainer) and trainer.validating:
        progress.increment_ready()
        progress.increment_started()


def forget_started_batch(trainer: Any) -> None:
    """Do not count the batch that was started but not run before a stop.

    Lightning places validations by this count.
    """
    trainer.fit_loop.epoch_loop.batch_progress.total.reset_on_restart()


def forget_stopped_validation(trainer: Any) -> None:
    """Subtract the batches of a validation that a stop has cut off from the run's total."""
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()


def count_steps_from(trainer: Any, step: int) -> None:
    """Let the next row be logged under this step.

    After a stop between two batches Lightning's count is one ahead.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


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


def rank_without_trainer() -> int:
    """Return this process's global rank as its launcher's environment variables give it."""
    return int(rank_zero_only.rank)  # type: ignore[attr-defined]


def set_rank_without_trainer(rank: int) -> None:
    """Set what `rank_without_trainer` returns.

    This is for a process that imported Lightning before its variables were set.
    """
    rank_zero_only.rank = rank  # type: ignore[attr-defined]


def started_ranks(strategy: Any) -> Sequence[subprocess.Popen[bytes]]:
    """Return the processes of local ranks 1, 2, ..., if this one has started them."""
    return getattr(strategy.launcher, "procs", [])


class ChildRanks(_MultiProcessingLauncher):
    """Starts all ranks as children by spawn or fork.

    Lightning's own gives the calling process the metrics of rank 0; this one also gives it the
    counts of the loops, such as trainer.global_step.
    """

    def get_extra_results(self, trainer: Any) -> dict[str, Any]:
        counts = trainer.fit_loop.state_dict()
        counts["state_dict"] = {}  # of data loaders, which no process may continue
        return {**super().get_extra_results(trainer), "counts": counts}

    def update_main_process_results(self, trainer: Any, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        trainer.fit_loop.load_state_dict(extra["counts"])
        trainer.fit_loop.restarting = False


def own_launcher(strategy: Any, launcher: Any) -> Any:
    """Return what starts the ranks in place of Lightning's launcher.

    Raise RuntimeError in a notebook or an interactive Python where several ranks would be started:
    their program cannot be run again.

    There, Lightning refuses a launcher even for one rank, which needs none: None.
    """
    if type(launcher) is _MultiProcessingLauncher:
        return ChildRanks(strategy, launcher._start_method)
    starts = isinstance(launcher, _SubprocessScriptLauncher)
    if (
        not (starts and _IS_INTERACTIVE)
        or strategy.cluster_environment.creates_processes_externally
    ):
        return launcher
    if strategy.num_processes * strategy.num_nodes > 1:
        raise RuntimeError(
            "Several ranks cannot be started by their command in a notebook or an interactive"
            " Python. Use ExpertParallelStrategy(start_method='fork') in the Trainer, or"
            " scmoe.train(config)."
        )
    return None


def leave_signals_alone(trainer: Any, numbers: Collection[int]) -> None:
    """Keep Lightning from setting handlers of these signals.

    It sets those of other signals as before. At its end it would put back the handlers that it
    found when training began: the Strategy's, which has ended then.
    """
    connector = trainer._signal_connector
    register = type(connector)._register_signal

    def register_others(number: int, handler: Any) -> None:
        if number not in numbers:
            register(number, handler)

    connector._register_signal = register_others


def requeue_signal(trainer: Any) -> int | None:
    """Return the signal by which SLURM asks to save and requeue the job, if any."""
    environment = trainer.strategy.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def save_and_requeue(trainer: Any, number: int) -> None:
    """Do what Lightning does in its handler of that signal.

    It saves `hpc_ckpt_N.ckpt` in the Trainer's `default_root_dir`, where the next start of the job
    looks for it, and rank 0 calls scontrol. Every rank must call it at the same step.
    """
    trainer._signal_connector._slurm_sigusr_handler_fn(number, None)


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
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    for callback in callbacks:
        await_saves_of(callback, checkpoints)

    def undo() -> None:
        for callback in callbacks:
            vars(callback).pop("file_exists", None)
            vars(callback).pop("_link_checkpoint", None)

    return undo


def await_saves_of(callback: Any, checkpoints: Checkpoints) -> None:
    exists, link = callback.file_exists, callback._link_checkpoint

    def exists_or_comes(filepath: Any, trainer: Any) -> bool:
        return checkpoints.is_coming(Path(filepath)) or exists(filepath, trainer)

    def link_when_saved(trainer: Any, filepath: str, linkpath: str) -> None:
        if checkpoints.is_coming(Path(filepath)):
            checkpoints.when_saved[Path(filepath)] = lambda: link(trainer, filepath, linkpath)
        else:
            link(trainer, filepath, linkpath)

    callback.file_exists, callback._link_checkpoint = exists_or_comes, link_when_saved


def is_of_trainer(path: Path, trainer: Any) -> bool:
    """Return whether a checkpoint is in a folder of this Trainer.

    Its path may be from a file of another person.
    """
    folders = [
        folder for c in trainer.checkpoint_callbacks if (folder := getattr(c, "dirpath", None))
    ]
    inside = any(
        Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(f)) for f in folders
    )
    of_tuner = path.parent == Path(trainer.default_root_dir)
    return path.name != ".." and (inside or of_tuner)


def skip_sigterm_broadcast(trainer: Any) -> None:
    """Remove the broadcast by which Lightning asks rank 0 for SIGTERM before every batch.

    It blocks.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def ddp_arguments(strategy: Any) -> dict[str, Any]:
    """Return the arguments with which DDPStrategy would make its DistributedDataParallel."""
    return {"device_ids": strategy.determine_ddp_device_ids(), **strategy._ddp_kwargs}


def register_ddp_hooks(strategy: Any) -> None:
    """Register the communication hooks that were given to DDPStrategy."""
    strategy._register_ddp_hooks()


def replace_after_closure(plugin: Any, hook: Callable[[Any, Optimizer], None] | None) -> None:
    """Call hook(module, optimizer) after backward and before the update.

    It takes the place of the plugin's own function. None puts that one back.
    """
    vars(plugin).pop("_after_closure", None)
    if hook is not None:
        plugin._after_closure = hook


def original_after_closure(plugin: Any, module: Any, optimizer: Optimizer) -> None:
    """Do what a precision plugin itself does between backward and update.

    It calls hooks, then lets the module clip.
    """
    type(plugin)._after_closure(plugin, module, optimizer)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest checkpoint alone, as `step=N.ckpt`.

    It saves every n-th step, at a stop and at the end of training. Lightning's own saves nothing at
    the end, and leaves the checkpoint from which a run was resumed. With another save_top_k, -1 or
    0, this one keeps all checkpoints or makes none.
    """

    def __init__(self, folder: Path | None, every_n_steps: int) -> None:
        super().__init__(folder, "{step}", every_n_train_steps=every_n_steps)

    def save(self, trainer: Any) -> None:
        """Save the current step. Every rank must call it."""
        assert self.dirpath is not None, "the Trainer has set it"
        self.best_model_path = str(Path(self.dirpath) / f"step={trainer.global_step}.ckpt")
        self._save_checkpoint(trainer, self.best_model_path)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.save_top_k and self._last_global_step_saved != trainer.global_step:
            self.save(trainer)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        for path in Path(filepath).parent.glob("step=*.ckpt") if self.save_top_k == 1 else ():
            step = re.fullmatch(r"step=(\d+)\.ckpt", path.name)
            if step and int(step[1]) < trainer.global_step:
                trainer.strategy.remove_checkpoint(path)  # once the new one is complete


class BestCheckpoints(ModelCheckpoint):
    """Keeps the checkpoints of the best validations, as `best-step=N.ckpt`.

    Lightning's own, in a resumed run, forgets them if the run's directory was moved, counts those
    that are gone, and never removes one if fewer are kept than before.
    """

    def __init__(self, folder: Path | None, monitor: str, mode: str, kept: int) -> None:
        super().__init__(folder, "best-{step}", monitor=monitor, mode=mode, save_top_k=kept)

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
        there = trainer.strategy.broadcast(
            [path for path in best_first if Path(path).exists()]
        )  # as rank 0 sees it
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


def as_of_base(callback: ModelCheckpoint | EarlyStopping, key: str) -> str:
    """Return a callback's key with the name of Lightning's class.

    Checkpoints of all versions have its state there.
    """
    return key.replace(type(callback).__qualname__, type(callback).__mro__[1].__qualname__, 1)


def shown_metrics(trainer: Any) -> dict[str, Any]:
    """Return the metrics of the progress bar, and train/loss.

    Reading the loss waits for the device; Lightning would read it after every batch on every rank,
    so it is not logged with prog_bar.
    """
    loss = {name: value for name, value in trainer.logged_metrics.items() if name == "train/loss"}
    return loss | trainer.progress_bar_metrics


class StepProgressBar(RichProgressBar):
    """Lightning's rich progress bar, on standard error, without the epoch: a training is one long
    epoch of steps.

    In a terminal of fewer than WIDE columns each metric has its own line, so that its value stands
    beside its name. In training the values are those of the last logged step.
    """

    def __init__(self) -> None:
        self.shown: dict[str, Any] = {}
        between = " " if get_terminal_size().columns >= WIDE else "\n"
        super().__init__(
            theme=RichProgressBarTheme(metrics_text_delimiter=between),
            console_kwargs={"stderr": True},
        )

    def configure_columns(self, trainer: Any) -> list[Any]:
        """Return a short bar, and no batches per second, which the logged throughput says."""
        description, bar, batches, time, _ = super().configure_columns(trainer)
        bar.bar_width = BAR
        return [description, bar, batches, time]

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        """Return the metrics without the logger's version."""
        trainer = arguments[0]
        if (
            not self.shown
            or not trainer.training
            or trainer.global_step % max(trainer.log_every_n_steps, 1) == 0
        ):
            self.shown = {name: float(value) for name, value in shown_metrics(trainer).items()}
        return self.shown

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
