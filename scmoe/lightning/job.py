"""Keeps the ranks of a job in step: they start together, with equally many batches, and stop at the
same step (faults 12 and 16).

Ranks exchange the flags of their signals (stop.py) at every step and read the sum one step later,
so all stop at one step, with exit code 128 + signal (143, 129, 130, SLURM's; 0 if another rank
started them) and, if training, with one complete checkpoint.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed import DistNetworkError, DistStoreError

from scmoe.lightning.seam import launch, loops, saves
from scmoe.lightning.stop import INTERRUPTED, StopSignal
from scmoe.lightning.trainer_checkpoints import refuse_checkpoint_io
from scmoe.parallel.checkpoint.saving import Checkpoints
from scmoe.parallel.dense.sharded import reshard
from scmoe.parallel.mesh import (
    Mesh,
    expert_parameters,
    give_up_groups,
    order_launches_of_nccl,
    stop_using_loopback,
    use_loopback_for_gloo,
)
from scmoe.parallel.wire.wire import Wire

LONGEST_S = 1e6  # what a timeout may be
# for ranks to meet: they import, read data and build their modules at different speeds
START_TIMEOUT_S = 600.0


def time_limits(timeout_s: float) -> tuple[timedelta, timedelta]:
    """Return how long a collective may take, and how long until all ranks have met. Raise
    ValueError for a time that is no limit."""
    if not 0 < timeout_s <= LONGEST_S:
        raise ValueError(
            f"timeout_s is {timeout_s}, allowed: above 0, at most {LONGEST_S:g} seconds"
        )
    timeout = timedelta(seconds=timeout_s)
    return timeout, max(timeout, timedelta(seconds=START_TIMEOUT_S))


def prepare_backends(num_nodes: int, at_teardown: ExitStack) -> None:
    """Set the environment variables that NCCL and gloo read. at_teardown: takes what undoes it."""
    order_launches_of_nccl()
    if num_nodes == 1 and use_loopback_for_gloo():
        at_teardown.callback(stop_using_loopback)


@contextmanager
def meeting(limit: timedelta) -> Iterator[None]:
    """Raise TimeoutError if the ranks do not find each other inside, and OSError if another process
    uses MASTER_PORT."""
    try:
        yield
    except (DistNetworkError, DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            said = str(error).partition("\n")[0]
            raise OSError(
                "another process uses MASTER_PORT; set it to a free port, the same on all ranks"
                f" ({said})"
            ) from error
        raise TimeoutError(
            f"the ranks did not find each other within {limit.total_seconds():g}"
            " s; start all of them, and check that each can reach MASTER_ADDR; a larger"
            " strategy.timeout_s lets them wait longer"
        ) from error


class Poll:
    """Sums flags over all ranks.

    Each sum is started in one call and read in the next, so that no call waits for it.

    group: a gloo group of all ranks. What else it carries must begin in the same order on all
    ranks, as gloo matches collectives by their order.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.pending: tuple[dist.Work, Tensor] | None = None

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank raised it in the call before.

        All ranks must call it equally often.
        """
        answers = self.close() or [False] * len(flags)
        sums = torch.tensor(flags, dtype=torch.int64)
        self.pending = (dist.all_reduce(sums, group=self.group, async_op=True), sums)
        return answers

    def smallest(self, count: float) -> float:
        """Wait for the smallest count of all ranks. Every rank must call it."""
        least = torch.tensor(count, dtype=torch.float64)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return least.item()

    def close(self) -> list[bool]:
        """Wait for the pending sum and return it; an empty list if there is none."""
        if self.pending is None:
            return []
        work, sums = self.pending
        work.wait()
        self.pending = None
        return [bool(n) for n in sums]


def check_even(stage: str, batches: Sequence[float], mesh: Mesh) -> None:
    """Raise ValueError on every rank if ranks have different numbers of batches.

    Every rank must call it. A rank without a next batch would leave the others waiting in a
    collective until the timeout. batches: one number for each loader; inf if its length is unknown.
    """
    if mesh.world_size == 1:
        return
    of_ranks: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(of_ranks, [float(n) for n in batches], group=mesh.control_group)
    if any(counts != of_ranks[0] for counts in of_ranks):
        counts = "; ".join(
            f"rank {rank}: {' + '.join(f'{n:g}' for n in ns)}" for rank, ns in enumerate(of_ranks)
        )
        raise ValueError(
            f"ranks have different numbers of {stage} batches ({counts}). Pad the last batches, or"
            f" set limit_{stage}_batches"
        )


def say(rank: int, line: str) -> None:
    """Print a line on rank 0, as Lightning's own loggers may be silent."""
    if rank == 0:
        print(line, file=sys.stderr, flush=True)


def explain_summary(trainer: Any, ep_size: int) -> None:
    """Say that Lightning's summary counts a part of the experts, where it is shown."""
    if ep_size > 1 and any(isinstance(callback, ModelSummary) for callback in trainer.callbacks):
        rank_zero_info(
            f"The model summary counts this rank's experts: 1 of {ep_size} parts of them."
        )


class RunningJob:
    """The part of the Strategy that keeps ranks in step.

    `open` comes before everything else, `close` at the end. wire: the module's. is_launched:
    another rank of this job has started this process.
    """

    def __init__(self) -> None:
        self.wire = Wire()
        self.is_launched = False
        self.stop = StopSignal()
        # the module, while it holds the weights of its last step of training
        self.trained: Any = None
        self.has_begun = False  # the first batch of this training
        # batches of this validation, test or prediction at which all ranks can still ask
        self.polls_left = 0
        # max_steps, until the validation of that step begins in a resumed run
        self.last_step: int | None = None
        self.poll: Poll
        self.trainer: Any = None
        self.checkpoints: Checkpoints

    @property
    def mesh(self) -> Mesh:
        return self.wire.mesh

    def open(self, trainer: Any, checkpoints: Checkpoints, is_launched: bool) -> None:
        """Begin to note signals. is_launched: another rank of this job has started this process."""
        refuse_checkpoint_io(trainer.strategy)
        explain_summary(trainer, self.mesh.ep_size)
        self.trainer = trainer
        self.checkpoints = checkpoints
        self.is_launched = is_launched
        self.stop = StopSignal(launch.requeue_signal(trainer), 0 if is_launched else INTERRUPTED)
        self.poll = Poll(self.mesh.control_group)
        self.stop.take()
        launch.leave_signals_alone(trainer, self.stop.numbers)
        if self.stop.requeue is not None and shutil.which("scontrol") is None:
            say(
                self.mesh.rank,
                "warning: scontrol is not found: a signal of SLURM saves and stops, but requeues"
                " nothing",
            )

    def resume(self, state: Mapping[str, Any]) -> None:
        """Let a training go on that has all its steps and was stopped in its last validation.

        state: of the checkpoint, before Lightning restores its loops.
        """
        self.last_step = loops.last_step_to_validate(self.trainer, state)
        if self.last_step is not None:
            loops.set_max_steps(self.trainer, self.last_step + 1)

    def _keep_last_step(self) -> None:
        """Let training end at its last step again."""
        if self.last_step is not None:
            loops.set_max_steps(self.trainer, self.last_step)
            self.last_step = None

    def begin_training(self) -> None:
        check_even("train", [self.trainer.num_training_batches], self.mesh)
        self.has_begun = False
        if loops.forget_undue_validation(self.trainer):
            self._keep_last_step()
        self.ask()  # so that no rank begins the first batch if one was stopped before it
        launch.skip_sigterm_broadcast(self.trainer)

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self.has_begun:  # its loader may be new in this epoch
            check_even("train", [self.trainer.num_training_batches], self.mesh)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.ask()
        # not earlier: making data loaders draws from the generator
        self.checkpoints.restore_random_state()
        # not earlier: a validation that runs again may find this step to be the best
        if not self.has_begun:
            self.has_begun = True
            saves.mark_step_as_saved(self.trainer)
        self.wire.begin_batch(tensors_in(batch))

    def begin_validation(self) -> None:
        trainer = self.trainer
        if trainer.sanity_checking:
            self.begin("val", trainer.num_sanity_val_batches)
        else:
            self.begin("val", trainer.num_val_batches)
            loops.forget_stopped_validation(trainer)
            self._keep_last_step()
            if loops.is_fitting(trainer):  # it may come before the first batch
                self.checkpoints.restore_random_state()

    def begin(self, stage: str, batches: Sequence[float]) -> None:
        """Let ranks ask at as many batches as the rank with the fewest has.

        If that number is unknown they cannot ask, and a SIGTERM ends the process at once.
        """
        has_experts = any(expert_parameters(self.trainer.lightning_module))
        shares_experts = self.mesh.ep_size > 1 and has_experts
        # Nothing else makes the ranks of a stage wait for each other.
        if shares_experts or self.mesh.dense_mesh is not None:
            check_even(stage, batches, self.mesh)
        fewest = self.poll.smallest(sum(batches))
        can_stop = not loops.accumulated_batches(self.trainer)  # else the step must end first
        if fewest == float("inf"):
            if can_stop:
                self.ask_and_wait()
            self.stop.give_back()
        elif can_stop:
            self.polls_left = int(fewest)

    def begin_evaluated_batch(self, inputs: Any) -> None:
        """Ask, if all ranks can, and let the first exchange of the batch be checked. inputs: of the
        step."""
        if self.polls_left > 0:
            self.polls_left -= 1
            self.ask()
        self.wire.begin_batch(tensors_in(inputs))

    def end_evaluation(self) -> None:
        self.polls_left = 0
        self.stop.take()
        # so that what follows finds the weights that optimizers hold
        reshard(self.trainer.lightning_module)

    def ask(self) -> None:
        """Ask all ranks whether one still writes a checkpoint or must stop.

        Act on the answers of the last call.
        """
        flags = self.checkpoints.is_writing(), self.stop.received, self.stop.must_requeue
        still_writing, stop, requeue = self.poll.any_rank(*flags)
        self.checkpoints.finish_unless(still_writing)
        if stop:
            self._save_and_exit(requeue)

    def ask_and_wait(self) -> None:
        """Ask once all ranks are here, and act on the answer at once."""
        dist.barrier(group=self.mesh.control_group)
        self.ask()
        self.ask()

    def _save_and_exit(self, requeue: bool) -> None:
        """Save a checkpoint, if there is anything new to save, and exit.

        All ranks do this at the same step.

        requeue: put the SLURM job into the queue again, unless it is a run of `scmoe train`: the
        command of its job would start a new run.

        A rank that Lightning's launcher has started exits with 0: any other code would make the
        launcher kill rank 0, which may still be closing loggers.
        """
        trainer = self.trainer
        if self.trained is trainer.lightning_module and not loops.accumulated_batches(trainer):
            self._save(requeue)
        elif requeue:
            say(
                self.mesh.rank,
                "stopped without saving, as nothing was trained; the job is not requeued",
            )
        self.checkpoints.finish()
        self.poll.close()
        raise SystemExit(0 if self.is_launched else self.stop.exit_code)

    def _save(self, requeue: bool) -> None:
        trainer = self.trainer
        self.checkpoints.restore_random_state()
        loops.restart_validation(trainer)
        loops.forget_started_batch(trainer)

        ours = [c for c in trainer.checkpoint_callbacks if isinstance(c, saves.LastCheckpoint)]
        if ours:
            ours[0].save_at_stop(trainer)
        elif requeue and self.stop.requeue is not None:
            self.checkpoints.finish()
            # the job must not end before the checkpoint is complete
            self.checkpoints.background = False
            launch.save_and_requeue(trainer, self.stop.requeue)
        else:
            kept = getattr(trainer.checkpoint_callback, "dirpath", None)
            folder = kept or trainer.default_root_dir
            # a folder may be on a remote storage, whose :// a Path would change
            path = os.path.join(folder, f"step={trainer.global_step}.ckpt")
            trainer.save_checkpoint(path)
            self.checkpoints.finish()
            say(
                self.mesh.rank,
                f"stopped at step {trainer.global_step}; to go on: trainer.fit(...,"
                f" ckpt_path={path!r})",
            )

    def close(self) -> None:
        """Complete the saves and give the signals back."""
        if self.trainer is None:  # the Strategy has refused a callback, so `open` never ran
            return
        self._keep_last_step()
        if loops.was_interrupted(self.trainer):  # other ranks may never come here
            give_up_groups()
        else:
            self.checkpoints.finish()
            self.ask_and_wait()  # so that a stop during or after the last step still ends in 143
            self.poll.close()
        self.stop.give_back()


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, where Lightning would move them to the device."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    apply_to_collection(batch, Tensor, note)
    yield from tensors
