"""What a run says and logs of its schedule: the plan, what really ran, and how much of the communication was hidden."""

from __future__ import annotations

import itertools
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from scmoe.parallel.planner import Overlap, Plan, Planner
from scmoe.training.callbacks.log_interval import logs_now


class PlanSchedule(Callback):
    """overlap/forward, overlap/backward: shares of the communication that were hidden, in each logged step.

    auto: choose slot and chunks by measurement, and anew where the times drift; else only measure, in the first steps.
    chunks: the numbers of chunks to choose from.
    Does nothing where no transfer takes place: one expert-parallel rank, or no experts.
    """

    def __init__(self, auto: bool, chunks: tuple[int, ...]) -> None:
        self.auto, self.chunks = auto, chunks
        self.planner: Planner | None = None
        self.shown: list[Plan] | None = None
        self.tell_what_ran = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        context: Any = pl_module.parallel_context
        blocks = [m for m in pl_module.modules() if hasattr(m, "schedule") and hasattr(m, "moe")]
        if context.ep_size == 1 or not blocks:
            return
        self.planner = Planner(blocks, None, pl_module.device, self.chunks, fixed=not self.auto)
        batches = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        if self.auto and batches <= self.planner.steps_to_plan:
            rank_zero_warn(
                f"schedule: auto plans after {self.planner.steps_to_plan} batches and {batches} are left: all run as "
                "configured; raise trainer.max_steps, or give schedule.slot and schedule.chunks"
            )

    def on_train_end(self, *_: Any) -> None:
        if self.planner is not None:
            self.planner.close()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.planner is not None:
            self.planner.begin_step(timed=logs_now(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.planner is None:
            return
        self.planner.end_step()
        plans, overlap = self.planner.plans, self.planner.overlap
        if plans is not None and plans is not self.shown:
            self.shown, self.tell_what_ran = plans, True
            if self.auto and trainer.is_global_zero:
                print("\n".join(plan_lines(plans)), file=sys.stderr, flush=True)
        if overlap is not None and logs_now(trainer, batch_idx):
            forward, backward = overlap.efficiency
            pl_module.log_dict({"overlap/forward": forward, "overlap/backward": backward})
            if self.tell_what_ran and trainer.is_global_zero:
                assert plans is not None
                print(what_ran(plans, overlap, self.planner.backend), file=sys.stderr, flush=True)
            self.tell_what_ran = False


def plan_lines(plans: list[Plan]) -> list[str]:
    """One line for each run of layers that are planned alike."""
    lines = []
    numbered = enumerate(plans, 1)
    for schedule, group in itertools.groupby(numbered, key=lambda item: item[1].schedule):
        (first, plan), *rest = group
        layers = f"MoE layers {first} to {rest[-1][0]}" if rest else f"MoE layer {first}"
        lines.append(
            f"plan: {layers}: {schedule.position}, slot {schedule.slot} of 0 to {len(schedule.window)}, "
            f"{schedule.chunks} chunk(s): {1e3 * plan.predicted:.1f} ms there and back, {1e3 * plan.exposed:.1f} ms of "
            f"it waiting for transfers (Eq. 11 would take slot {plan.eq11.slot})"
        )
    return lines


def what_ran(plans: list[Plan], overlap: Overlap, backend: str) -> str:
    ran = sorted({f"slot {p.schedule.slot} x {p.schedule.chunks}" for p in plans})
    predicted, measured = (1e3 * sum(seconds) for seconds in ((p.predicted for p in plans), overlap.seconds))
    sequential, free = (sum(sum(getattr(p, kind)) for p in plans) for kind in ("sequential", "free"))
    hidden = [f"{100 * share:.0f} %" for share in overlap.efficiency]
    return (
        f"ran: {backend}, {', '.join(ran)} (slot x chunks): {measured:.1f} ms of all MoE windows a step, predicted "
        f"{predicted:.1f}; of their communication, {100 * (1 - free / sequential):.0f} % of the time without overlap, "
        f"hidden: {hidden[0]} forward, {hidden[1]} backward"
    )
