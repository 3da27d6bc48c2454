"""How Lightning starts ranks and hears signals: launchers, ranks without a Trainer, SLURM."""

import subprocess
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import (
    _MultiProcessingLauncher,
    _SubprocessScriptLauncher,
)
from lightning.pytorch.utilities import rank_zero_only


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

    Return None for one rank in a notebook or an interactive Python: it needs no launcher, and
    Lightning refuses one. Raise RuntimeError for several ranks there: their program cannot be run
    again.
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
    # no function in a function: a Trainer can be pickled
    connector._register_signal = partial(
        _register_others, type(connector)._register_signal, tuple(numbers)
    )


def _register_others(register: Any, numbers: Collection[int], number: int, handler: Any) -> None:
    if number not in numbers:
        register(number, handler)


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


def skip_sigterm_broadcast(trainer: Any) -> None:
    """Remove the broadcast by which Lightning asks rank 0 for SIGTERM before every batch.

    It blocks.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody


def _ask_nobody() -> None:
    pass
