"""Ranks start together, with equally many batches, stop together, at the same step, and fail
together (faults 12, 14 and 16).

SIGTERM, SIGHUP (a terminal that is gone) or Ctrl-C on any rank sets a flag. Ranks exchange their
flags at every step and read the sum one step later, so all of them stop at one step, with exit code
143, 129 or 130 and, if they were training, with one complete checkpoint. Lightning's own handlers
broadcast or save inside the signal handler, while other ranks are in other collectives: a deadlock.
So they are not installed. Under SLURM the signal that asks to requeue the job (SIGUSR1) sets a flag
too; at the agreed step the ranks do what Lightning's handler does.

When a collective fails because another rank left it, its error gets a note that names the missing
rank. The collective's own error only says that it timed out or that a connection closed. So the
remaining ranks contact each other once more, briefly, in a group that the broken collective has not
used. `dist.monitored_barrier` would name the missing ranks too, but if rank 0 is missing it waits
for the group's timeout instead of its own.
"""

import atexit
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from scmoe.lightning import seam
from scmoe.parallel.checkpoint.saving import Checkpoints
from scmoe.parallel.dense import reshard
from scmoe.parallel.mesh import ParallelContext, expert_parameters

EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# a second Ctrl-C within this time is the same one: a key pressed twice, or sent by a wrapper too
AGAIN_S = 1.0
ROLL_CALL_S = 3.0
LEFT_ALONE = re.compile(r"timed out|connection closed|connection reset|broken pipe", re.IGNORECASE)


class StopSignal:
    """The process's SIGNALS as a flag, `received`. Only the main thread can take signals.

    requeue: the signal that asks to requeue a SLURM job, which sets the flag `must_requeue` too;
    None: there is none.
    code_of_second: the exit code at a second Ctrl-C.
    """

    def __init__(self, requeue: int | None = None, code_of_second: int = INTERRUPTED) -> None:
        self.received, self.must_requeue = False, False
        self.exit_code, self.code_of_second = EXIT_CODE, code_of_second
        self.requeue = requeue
        self.interrupted_s = math.inf  # the time of the first Ctrl-C
        self.before: dict[int, Any] = {}  # the handlers that were replaced

    @property
    def numbers(self) -> tuple[int, ...]:
        return SIGNALS if self.requeue is None else (*SIGNALS, self.requeue)

    def take(self) -> None:
        """From here on a signal only sets the flag, unless it is ignored. A second Ctrl-C, AGAIN_S
        after the first or later, ends the process at once."""
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                if number not in self.before and signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note) or signal.SIG_DFL

    def give_back(self) -> None:
        """From here on a signal does what it did before `take`; by default SIGTERM ends the process
        at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, _: Any) -> None:
        self.received, self.exit_code = True, 128 + number
        self.must_requeue = self.must_requeue or number == self.requeue
        if number == signal.SIGHUP:
            discard_output_of_closed_terminal()
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self.interrupted_s > AGAIN_S:
                raise SystemExit(self.code_of_second)
            self.interrupted_s = min(self.interrupted_s, now)


def discard_output_of_closed_terminal() -> None:
    """Let what this process prints go nowhere where its terminal is gone: writing would raise
    before the save."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


class Poll:
    """Sums flags over all ranks. Each sum is started in one call and read in the next, so that no
    call waits for it.

    group: a gloo group of all ranks. What else it carries must begin in the same order on all
    ranks, as gloo matches collectives by their order.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.in_flight: tuple[dist.Work, Tensor] | None = None

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank raised it in the call before. All ranks must call
        it equally often."""
        answers = self.close() or [False] * len(flags)
        sums = torch.tensor(flags, dtype=torch.int64)
        self.in_flight = (dist.all_reduce(sums, group=self.group, async_op=True), sums)
        return answers

    def smallest(self, count: float) -> float:
        """Wait for the smallest count of all ranks. Every rank must call it."""
        least = torch.tensor(count, dtype=torch.float64)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return least.item()

    def close(self) -> list[bool]:
        """Wait for the sum in flight and return it; an empty list if there is none."""
        if self.in_flight is None:
            return []
        work, sums = self.in_flight
        work.wait()
        self.in_flight = None
        return [bool(n) for n in sums]


def check_even(stage: str, batches: Sequence[float], context: ParallelContext) -> None:
    """Raise ValueError on every rank if ranks have different numbers of batches. Every rank must
    call it.

    A rank without a next batch would leave the others waiting in a collective until the timeout.
    batches: one number for each loader; inf if its length is unknown.
    """
    if context.world_size == 1:
        return
    of_ranks: list[Any] = [None] * context.world_size
    dist.all_gather_object(of_ranks, [float(n) for n in batches], group=context.control_group)
    if any(counts != of_ranks[0] for counts in of_ranks):
        counts = "; ".join(
            f"rank {rank}: {' + '.join(f'{n:g}' for n in ns)}" for rank, ns in enumerate(of_ranks)
        )
        raise ValueError(
            f"ranks have different numbers of {stage} batches ({counts}), allowed: the same number"
            f" on each rank; pad the last batches, or set limit_{stage}_batches"
        )


class Job:
    """The part of the Strategy that keeps ranks in step. `open` comes before everything else,
    `close` at the end.

    context: the rank's place. is_launched: another rank of this job has started this process.
    """

    def __init__(self) -> None:
        self.context = ParallelContext()
        self.is_launched = False
        self.stop = StopSignal()
        self.trained: Any = (
            None  # the module, while it holds the weights of its last step of training
        )
        self.has_begun = False  # the first batch of this training
        self.polls_left = (
            0  # batches of this validation, test or prediction at which all ranks can still ask
        )
        self.poll: Poll
        self.trainer: Any = None
        self.checkpoints: Checkpoints

    def open(self, trainer: Any, checkpoints: Checkpoints, is_launched: bool) -> None:
        self.trainer, self.checkpoints, self.is_launched = trainer, checkpoints, is_launched
        self.stop = StopSignal(seam.requeue_signal(trainer), 0 if is_launched else INTERRUPTED)
        self.poll = Poll(self.context.control_group)
        self.stop.take()
        seam.leave_signals_alone(trainer, self.stop.numbers)
        if self.stop.requeue is not None and shutil.which("scontrol") is None:
            self._say(
                "warning: scontrol is not found: a signal of SLURM saves and stops, but requeues"
                " nothing"
            )

    def begin_training(self) -> None:
        check_even("train", [self.trainer.num_training_batches], self.context)
        self.has_begun = False
        self.ask()  # so that no rank begins the first batch if one was stopped before it
        seam.skip_sigterm_broadcast(self.trainer)

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.ask()
        # not earlier: making data loaders draws from the generator
        self.checkpoints.restore_random_state()
        if (
            not self.has_begun
        ):  # not earlier: a validation that runs again may find this step to be the best
            self.has_begun = True
            seam.mark_step_as_saved(self.trainer)
        context = self.context
        if context.ep_size > 1:
            context.even.begin(tensors_in(batch), context.control_group, context.ep_size)

    def begin_validation(self) -> None:
        trainer = self.trainer
        self.begin(
            "val",
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches,
        )
        if not trainer.sanity_checking:
            seam.forget_stopped_validation(trainer)

    def begin(self, stage: str, batches: Sequence[float]) -> None:
        """Let ranks ask at as many batches as the rank with the fewest has. If that number is
        unknown they cannot ask, and a SIGTERM ends the process at once."""
        shares_experts = self.context.ep_size > 1 and any(
            expert_parameters(self.trainer.lightning_module)
        )
        if (
            shares_experts or self.context.dense_mesh is not None
        ):  # else nothing keeps ranks in step
            check_even(stage, batches, self.context)
        fewest = self.poll.smallest(sum(batches))
        can_stop = not seam.accumulated_batches(self.trainer)  # else the step must end first
        if fewest == float("inf"):
            if can_stop:
                self.ask_and_wait()
            self.stop.give_back()
        elif can_stop:
            self.polls_left = int(fewest)

    def ask_if_all_can(self) -> None:
        if self.polls_left > 0:
            self.polls_left -= 1
            self.ask()

    def end_evaluation(self) -> None:
        self.polls_left = 0
        self.stop.take()
        reshard(
            self.trainer.lightning_module
        )  # what follows finds the weights that optimizers hold

    def ask(self) -> None:
        """Ask all ranks whether one still writes a checkpoint or must stop, and act on the answers
        of the last call."""
        flags = self.checkpoints.is_writing(), self.stop.received, self.stop.must_requeue
        still_writing, stop, requeue = self.poll.any_rank(*flags)
        self.checkpoints.finish_unless(still_writing)
        if stop:
            self._save_and_exit(requeue)

    def ask_and_wait(self) -> None:
        """Ask once all ranks are here, and act on the answer at once."""
        dist.barrier(group=self.context.control_group)
        self.ask()
        self.ask()

    def _save_and_exit(self, requeue: bool) -> None:
        """Save a checkpoint, if there is anything new to save, and exit; all ranks do this at the
        same step.

        requeue: put the SLURM job into the queue again, unless it is a run of `scmoe train`: the
        command of its job would start a new run.

        A rank that Lightning's launcher has started exits with 0: any other code would make the
        launcher kill rank 0, which may still be closing loggers.
        """
        trainer = self.trainer
        if self.trained is trainer.lightning_module and not seam.accumulated_batches(trainer):
            self.checkpoints.restore_random_state()
            seam.restart_validation(trainer)
            seam.forget_started_batch(trainer)
            if isinstance(last := trainer.checkpoint_callback, seam.LastCheckpoint):
                last.save(trainer)
            elif requeue and self.stop.requeue is not None:
                self.checkpoints.finish()
                # the job must not end before the checkpoint is complete
                self.checkpoints.background = False
                seam.save_and_requeue(trainer, self.stop.requeue)
            else:
                folder = getattr(last, "dirpath", None) or trainer.default_root_dir
                path = Path(folder) / f"step={trainer.global_step}.ckpt"
                trainer.save_checkpoint(path)
                self.checkpoints.finish()
                step = trainer.global_step
                self._say(
                    f"stopped at step {step}; to go on: trainer.fit(..., ckpt_path={str(path)!r})"
                )
        elif requeue:
            self._say("stopped without saving, as nothing was trained; the job is not requeued")
        self.checkpoints.finish()
        self.poll.close()
        raise SystemExit(0 if self.is_launched else self.stop.exit_code)

    def _say(self, line: str) -> None:
        if self.context.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.trainer is None:  # the Strategy has refused a callback, so `open` never ran
            return
        if not seam.was_interrupted(self.trainer):  # else other ranks may never come here
            self.checkpoints.finish()
            self.ask_and_wait()  # so that a stop during or after the last step still ends in 143
            self.poll.close()
        self.stop.give_back()


def tensors_in(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, where Lightning would move them to the device."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    apply_to_collection(batch, Tensor, note)
    return found


class SavePostponed(Callback):
    """Saves what was requested inside a step: once it is taken, or at the end of a training that
    ends inside it.

    After the first step it also makes what a checkpoint would hold, without writing it, so that
    something that cannot be saved ends the run then and not hours later. Without a callback that
    saves it does not."""

    def __init__(self) -> None:
        self.has_checked = False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not seam.accumulated_batches(trainer):
            self.check(trainer)
            self.save(trainer)

    def check(self, trainer: Any) -> None:
        if trainer.checkpoint_callbacks and not self.has_checked:
            self.has_checked = True
            weights_only = all(
                getattr(c, "save_weights_only", False) for c in trainer.checkpoint_callbacks
            )
            saved = seam.what_is_saved(trainer, weights_only)
            trainer.strategy.checkpoints.check(saved, trainer.lightning_module)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        if seam.accumulated_batches(trainer) and trainer.strategy.checkpoints.postponed:
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
            trainer.save_checkpoint(path, postponed.pop(path))


# ---------------------------------------------------------------------- a rank that has left


def note_absent(error: BaseException, context: ParallelContext) -> list[int]:
    """Return the ranks that do not answer; add them, and where this rank waited, to the error.

    If the error is not that of a collective that another rank has left, it stays as it is, and the
    list is empty.
    """
    if not isinstance(error, RuntimeError) or not LEFT_ALONE.search(str(error)):
        return []
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename
    ]
    where = (
        f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name}"
        if frames
        else "the start"
    )
    absent = roll_call(context)
    if absent:
        answer = f"no answer from rank {', '.join(map(str, absent))}"
    else:
        answer = (
            "all ranks answer, so one was late"
            if context.rank == 0
            else "rank 0 answers; its error says more"
        )
    error.add_note(f"rank {context.rank} waited at {where}; roll call: {answer}")
    return absent


def roll_call(context: ParallelContext) -> list[int]:
    """Return the ranks that do not answer within ROLL_CALL_S: rank 0 asks all, the others ask rank
    0 alone."""
    group, deadline, absent = context.checkpoint_group, time.monotonic() + ROLL_CALL_S, []
    words = {
        rank: torch.zeros(1)
        for rank in (range(1, context.world_size) if context.rank == 0 else [0])
    }
    answers = {}
    for rank, word in words.items():
        try:
            answer = (dist.irecv if context.rank == 0 else dist.isend)(word, rank, group=group)
            assert answer is not None, "this rank is in the group"
            answers[rank] = answer
        except RuntimeError:  # its connection is closed
            absent.append(rank)
    for rank, answer in answers.items():
        try:
            answer.wait(timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:
            absent.append(rank)
    return sorted(absent)


def end_job_at_exit(
    children: Sequence[subprocess.Popen[bytes]], absent: Sequence[int], parent: int | None
) -> None:
    """When this process exits, end the other processes of the job on this machine, which may be
    stopped or stuck.

    children: local ranks 1, 2, ..., if this process has started them. Those in `absent` are killed.
    The others and the parent (its process id, if it is a rank of this job) are continued in case
    they are stopped: they then find themselves alone and end with a traceback of their own.
    """

    def end() -> None:
        for local_rank, child in enumerate(children, 1):
            child.send_signal(signal.SIGKILL if local_rank in absent else signal.SIGCONT)
        if parent is not None and os.getppid() == parent:
            os.kill(parent, signal.SIGCONT)

    atexit.register(end)
