"""The schedule of a run: the planner's choice, what ran, and how much communication was hidden."""

import itertools
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.files import read_json, try_to_write_json
from scmoe.models.run_as import schedule_of
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.planning.plan_file import (
    NO_PLAN,
    Plan,
    in_flight_from,
    kept_plan,
    plan_from_json,
    plan_to_json,
    up_to,
)
from scmoe.planning.planner import LEAST_SHARE, Overlap, Planner
from scmoe.planning.pricing import DIRECTIONS
from scmoe.report import say
from scmoe.schedule.cost import mismatch, mismatch_bounds
from scmoe.training.callbacks.logged_steps import logs_now

TRIES_TWO = (
    "plan: two batches in flight are tried too. With them a capacity counts the tokens of a half,"
    " and dropout and a noisy gate draw in another order. schedule.batches_in_flight=1 keeps one"
    " batch."
)


class AdaptiveSchedule(Callback):
    """Logs overlap/forward and overlap/backward: the shares of the communication that a logged step
    has hidden, where it can be measured; and the times behind them.

    It does nothing without transfers: with one expert-parallel rank, or without experts.

    auto: choose slot and chunks by measurement; otherwise only measure. chunks: the numbers of
    chunks to choose from. plan: on rank 0, the file where the choice is kept; a resumed run with
    the same settings takes it from there instead of measuring again. settings: those under which a
    plan is valid, beside the planner's own. in_flight: the numbers of batches in flight to choose
    from; for a network that cannot have two it is one. Without auto the network keeps its own
    number, and nothing is measured while it is two. length_key: what sets the number of steps.
    """

    def __init__(
        self,
        auto: bool,
        chunks: tuple[int, ...],
        plan: Path | None = None,
        settings: dict[str, Any] | None = None,
        in_flight: tuple[int, ...] = (1,),
        length_key: str = "trainer.max_steps",
    ) -> None:
        self.auto = auto
        self.chunks = chunks
        self.plan = plan
        self.settings = settings or {}
        self.in_flight = in_flight
        self.length_key = length_key
        self.conditions: dict[str, Any] = {}  # under which a plan is valid
        self.earlier: Plan = NO_PLAN  # what this run has kept last, on rank 0
        self.planner: Planner | None = None
        self.shown: ModelChoice | None = None
        self.show_what_ran = False
        self.measures = True  # in the batch that runs

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        blocks = moe_blocks_of(module)
        mesh = module.wire.mesh
        if mesh.ep_size == 1 or not blocks:
            if self.auto:
                rank_zero_warn(
                    "schedule: auto has nothing to choose, as every rank has all experts"
                )
            return

        in_a_step = trainer.accumulate_grad_batches
        self.planner = Planner(
            module,
            None,
            module.device,
            self.chunks,
            not self.auto,
            mesh.ep_size,
            batches=in_a_step,
            numbers_in_flight=self.in_flight,
        )
        self.conditions = {"ep_size": mesh.ep_size, **self.planner.conditions, **self.settings}
        if self.auto and self.take_kept_plan(trainer, self.planner):
            return
        if 2 in self.planner.numbers_in_flight and trainer.is_global_zero:
            say(TRIES_TWO)
        batches = (trainer.max_steps - trainer.global_step) * in_a_step
        if self.auto and batches <= self.planner.steps_to_choose:
            rank_zero_warn(
                f"schedule: auto may need {self.planner.steps_to_choose} batches to choose and"
                f" {batches} are left, so this run may end without a choice. Raise"
                f" {self.length_key}, or give schedule.slot and schedule.chunks in place of"
                " schedule=auto"
            )

    def take_kept_plan(self, trainer: Trainer, planner: Planner) -> bool:
        """Make the planner follow the plan of the resumed run, if it is valid here too. Return
        whether it is."""
        kept = NO_PLAN
        if self.plan is not None:
            kept = kept_plan(self.plan, self.conditions)
            self.earlier = up_to(read_json(self.plan), trainer.global_step)
        kept = trainer.strategy.broadcast(dict(kept))
        if not kept:
            return False
        choice = plan_from_json(kept)
        planner.take(choice)
        self.shown, self.show_what_ran = choice, True
        if trainer.is_global_zero:
            show(choice)
            if in_flight_from(kept) != in_flight_from(self.earlier):  # chosen at a later step
                self.keep(choice, trainer.global_step)
        return True

    def on_train_end(self, *_: Any) -> None:
        if self.planner is not None:
            self.planner.close()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.planner is None:
            return
        self.measures = self.auto or schedule_of(module).is_measurable
        if self.measures:
            self.planner.begin_step(timed=logs_now(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.planner is None or not self.measures:
            return
        self.planner.end_step()
        choice = self.planner.choice
        if choice is None:
            return
        if self.shown is None:
            self.shown, self.show_what_ran = choice, True
            if self.auto and trainer.is_global_zero:
                show(choice)
                self.keep(choice, trainer.global_step)

        overlap = self.planner.overlap
        if overlap is not None and logs_now(trainer, batch_idx):
            module.log_dict(overlap_metrics(choice, overlap))
            if self.show_what_ran and trainer.is_global_zero:
                say(what_ran(overlap))
            self.show_what_ran = False

    def keep(self, choice: ModelChoice, step: int) -> None:
        """Write the plan where a resumed run finds it. step: from which on it runs."""
        if self.plan is not None:
            self.earlier = plan_to_json(choice, self.conditions, step, self.earlier)
            try_to_write_json(self.plan, self.earlier)


def show(choice: ModelChoice) -> None:
    """Print a plan."""
    say("\n".join(plan_lines(choice)))


def plan_lines(choice: ModelChoice) -> list[str]:
    """Return two lines for each run of neighbouring layers with the same schedule."""
    lines = []
    times = choice.predicted_and_exposed
    for schedule, group in itertools.groupby(
        enumerate(choice.layers, 1), key=lambda item: item[1].schedule
    ):
        (first, layer), *rest = group
        predicted, exposed = times[first - 1]
        layers = f"MoE layers {first} to {rest[-1][0]}" if rest else f"MoE layer {first}"
        lines.append(
            f"plan: {layers}: {schedule.name}, {schedule.place} of 0 to {len(schedule.window)},"
            f" {schedule.chunks} chunk(s){choice.schedule.batches_in_words}:"
            f" {1e3 * predicted:.1f} ms forward and backward,"
            f" of which {1e3 * exposed:.1f} ms wait for transfers"
            f"{beside_computation(layer) if choice.batches == 1 else ''}"
        )
        lines.append(eq11_line(layer))
    return lines


def beside_computation(choice: LayerChoice) -> str:
    """Return how much a window hides, and how much chunks alone would; nothing without a window."""
    if not choice.schedule.window:
        return ""
    clause = f", {1e3 * choice.overlapped:.1f} ms of transfers run beside computation"
    by_chunks = choice.overlapped_by_chunks
    if by_chunks:
        ratio = choice.overlapped / by_chunks
        clause += f" ({ratio:.1f} times the {1e3 * by_chunks:.1f} ms of chunks without a window)"
    return clause


def eq11_line(choice: LayerChoice) -> str:
    schedule = choice.eq11
    times = choice.times[schedule.chunks]
    least, most = mismatch_bounds(schedule, times)
    return (
        f"plan: Eq. 11 would choose slot {schedule.slot}, whose mismatch is"
        f" {1e3 * mismatch(schedule, times):.1f} ms in forward; its bounds are {1e3 * least:.1f}"
        f" and {1e3 * most:.1f} ms"
    )


def what_ran(overlap: Overlap) -> str:
    """Return a line: how much of the transfers was hidden."""
    clauses: dict[str, list[str]] = {}
    for direction, share, part in zip(DIRECTIONS, overlap.shares, overlap.efficiency, strict=True):
        if part is not None:
            clause = f"computation hid {100 * part:.0f} % of the transfers between ranks in {{}}"
        elif share < LEAST_SHARE:
            clause = "transfers between ranks took too little time in {} to be measured"
        else:
            clause = "what was hidden in {} cannot be measured, as happens on a busy machine"
        clauses.setdefault(clause, []).append(direction)
    words = [clause.format(" and ".join(names)) for clause, names in clauses.items()]
    return f"overlap: {'; '.join(words)}"


def overlap_metrics(choice: ModelChoice, overlap: Overlap) -> dict[str, float]:
    """Return the metrics of a timed step: the hidden parts that were measured, communication's
    shares of the time without overlap, and the windows' time with the predicted one."""
    metrics = {
        "overlap/windows_ms": 1e3 * sum(overlap.seconds),
        "overlap/predicted_ms": 1e3 * sum(layer.predicted for layer in choice.layers),
    }
    for direction, share, part in zip(DIRECTIONS, overlap.shares, overlap.efficiency, strict=True):
        metrics[f"overlap/{direction}_share"] = share
        if part is not None:
            metrics[f"overlap/{direction}"] = part
    return metrics
