"""What a run measures of its routers and sub-layers, and keeps in <run>/analysis/: the experts'
load, Fig. 9, Fig. 10.

    expert_load.csv   a row for each logged step and MoE layer: copies of each expert, dropped
                      copies, load of single steps (`SINGLE_STEPS`)
    expert_load.png   the last row of each layer as a heat map, and the worst layer's load over
                      training
    routing/          a file for each recorded step (probes/routing.py)
    gating.npz        steps [n], labels [L], values [n, L, 4]                              gating.png
    similarity.npz    steps [n], labels [N], values [n, N, N]                              similarity.png

Values are over the tokens of all ranks. For Fig. 9 and 10 a probe is attached for one batch at
intervals, then removed; while the disk is full, their values are kept in memory.
"""

import csv
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.extras import install_command
from scmoe.files.writing import try_to_append, try_to_draw, try_to_write
from scmoe.moe.balance import SINGLE_STEPS, load_metrics, over_steps, step_load
from scmoe.probes.charts import BLUE, ORANGE, SMALL, chart, title
from scmoe.probes.representations import (
    GatingProbe,
    SimilarityProbe,
    draw_gating,
    draw_similarity,
    gating_metrics,
    means,
    similarity_metrics,
)
from scmoe.probes.routing import Recorded, RoutingProbe, write_routing
from scmoe.training.callbacks.progress import ends_step, logs_now

# of a heat map with numbers in its cells, in a row; with more experts they would not be readable
CELLS = 16
PATIENCE = 5  # logged windows in a row


class ExpertLoad(Callback):
    """Logs moe/load_max, load_entropy, dead_experts, drop_share and real_experts of all steps since
    the last log, and moe/<name> for `SINGLE_STEPS`: the median and the worst of these steps, in the
    worst layer.

    folder: where the load of each expert is kept and drawn; None: nowhere.
    Everything stays on the device until a step is logged.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.table = folder and folder / "expert_load.csv"
        self.sums_LE2: Tensor | None = None
        self.steps: list[Tensor] = []  # the load of each step since the last log
        self.last: list[list[int]] = []  # the integer sums of the last log
        self.alarm = CollapseAlarm()

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Keep the rows of a resumed run before the step that it continues from."""
        blocks = enumerate(moe_blocks_of(module))
        self.alarm = CollapseAlarm(
            {layer for layer, block in blocks if isinstance(block, DoubleGateBlock)}
        )
        if self.table is not None and self.table.exists():
            with self.table.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
            if len(rows) < 2:  # a killed run may have left half a header
                self.table.unlink()
                return
            whole = [row for row in rows if len(row) == len(rows[0])]  # or half a row
            kept = [*rows[:1], *(row for row in whole[1:] if int(row[0]) < trainer.global_step)]
            if kept and SINGLE_STEPS[0] not in kept[0]:  # a table of an earlier version
                kept = [
                    [*kept[0], *SINGLE_STEPS],
                    *([*row, *[""] * len(SINGLE_STEPS)] for row in kept[1:]),
                ]
            try_to_write(self.table, lambda path: path.write_text(as_csv(kept), encoding="utf-8"))

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sums_LE2 = outputs["step_sums_LE2"]
        if sums_LE2 is None or not ends_step(trainer, batch_idx):
            return
        self.steps.append(step_load(sums_LE2, module.parallel_context.ep_size))
        self.sums_LE2 = sums_LE2 if self.sums_LE2 is None else self.sums_LE2 + sums_LE2
        if logs_now(trainer, batch_idx):
            load, single_L6 = load_metrics(self.sums_LE2), over_steps(self.steps)
            load |= dict(zip(SINGLE_STEPS, single_L6.amax(0), strict=True))
            module.log_dict({f"moe/{name}": value.float() for name, value in load.items()})
            for line in self.alarm(self.sums_LE2):
                rank_zero_warn(line)
            if self.table is not None:
                self.last = self.sums_LE2.tolist()
                self.keep(self.table, trainer.global_step - 1, single_L6.tolist())
            self.sums_LE2, self.steps = None, []

    def keep(self, table: Path, step: int, single_L6: list[list[float]]) -> None:
        """Append the last sums to the table. step: as in metrics.csv."""
        experts = [f"expert_{i}" for i in range(len(self.last[0]) - 2)]
        header = [] if table.exists() else [["step", "layer", *experts, "dropped", *SINGLE_STEPS]]
        layers = enumerate(zip(self.last, single_L6, strict=True))
        rows = [
            [step, layer, *counts_E, dropped, *(f"{value:.4g}" for value in single)]
            for layer, ((*counts_E, _, dropped), single) in layers
        ]
        try_to_append(table, as_csv([*header, *rows]))

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self.table is None or not self.last:
            return
        if find_spec("matplotlib") is None:
            rank_zero_warn(
                "no heat map of the experts' load is drawn; it needs"
                f" {install_command('matplotlib')}"
            )
        else:
            table, counts_LE = self.table, [counts_E for *counts_E, _, _ in self.last]
            try_to_draw(
                table.with_suffix(".png"),
                lambda path: draw_load(counts_LE, path, worst_layers(table)),
            )


def as_csv(rows: list[list[Any]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def worst_layers(table: Path) -> dict[int, list[float]]:
    """Return for each logged step in an ExpertLoad's table the worst layer's load: of the sums over
    steps, then the first four of SINGLE_STEPS. Rows of an earlier version, without these, are left
    out."""
    found: dict[int, list[float]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row[SINGLE_STEPS[0]]:
                counts_E = [
                    int(row[f"expert_{i}"])
                    for i in range(sum(name.startswith("expert_") for name in row))
                ]
                values = [max(counts_E) * len(counts_E) / max(sum(counts_E), 1)]
                values += [float(row[name]) for name in SINGLE_STEPS[:4]]
                before = found.get(step := int(row["step"]), values)
                found[step] = [max(pair) for pair in zip(before, values, strict=True)]
    return found


def draw_load(
    counts_LE: list[list[int]], path: Path, over_training: Mapping[int, Sequence[float]]
) -> None:
    """Draw the copies of each expert over the fair share of its layer, for every MoE layer; below
    it the worst layer's load over training, as `worst_layers` returns it."""
    num_layers, num_experts = len(counts_LE), len(counts_LE[0])
    share_LE = [
        [count * num_experts / max(sum(counts_E), 1) for count in counts_E]
        for counts_E in counts_LE
    ]
    heights = [min(1.6 + 0.35 * num_layers, 8.0)]  # inches
    if len(over_training) > 1:
        heights.append(2.4)
    with chart(path, sum(heights) + 0.6 * (len(heights) - 1)) as figure:
        axis, *below = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        image = axis.imshow(
            share_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest"
        )
        if num_experts <= CELLS:
            for layer, row in enumerate(share_LE):
                for expert, share in enumerate(row):
                    axis.text(
                        expert, layer, f"{share:.1f}", ha="center", va="center", fontsize=SMALL
                    )
        axis.set(xlabel="expert", ylabel="MoE layer")
        axis.set_xticks(range(0, num_experts, -(-num_experts // CELLS)))
        axis.set_yticks(range(0, num_layers, -(-num_layers // CELLS)))
        title(axis, "Load: copies over the fair share, last logged steps")
        figure.colorbar(image, ax=axis, extend="max")
        for axis in below:
            draw_load_over_training(axis, over_training)


def draw_load_over_training(axis: Any, worst: Mapping[int, Sequence[float]]) -> None:
    steps, columns = list(worst), list(zip(*worst.values(), strict=True))
    of_sums, *single = columns
    for (median, most), color, who in zip(
        (single[:2], single[2:]), (BLUE, ORANGE), ("expert", "rank"), strict=True
    ):
        if max(most) > 1:  # one expert-parallel rank has everything
            axis.fill_between(steps, median, most, color=color, alpha=0.25, linewidth=0)
            axis.plot(
                steps,
                median,
                color=color,
                linewidth=1.5,
                label=f"busiest {who} of a step, median to worst",
            )
    axis.plot(
        steps,
        of_sums,
        color=BLUE,
        linestyle=":",
        linewidth=1.5,
        label="busiest expert of all steps together",
    )
    axis.set(xlabel="optimizer step", ylim=(1, None))
    axis.grid(axis="y")
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower left")
    title(axis, "Load over the fair share since the last log, worst layer")


class CollapseAlarm:
    """Detects a collapsed router: one that keeps sending nearly all tokens to few experts.

    An expert that gets more tokens learns faster, so it gets even more (Shazeer et al. 2017). A
    busy expert alone is no fault: many times the fair share is usual at the start. The alarm is
    raised once for each layer, where both hold:

        how much    an expert is chosen by more than (K/E + 1) / 2 of all tokens, where each token
                    chooses K of E experts: this limit is halfway between its fair share, K/E, and
                    all tokens
        how long    in each of PATIENCE logged windows in a row

    doubled: the layers whose sums count each token twice, those of DGMoE.
    """

    def __init__(self, doubled: Collection[int] = ()) -> None:
        self.doubled = doubled
        self.windows: dict[
            int, int
        ] = {}  # layer: number of windows in a row in which it was collapsed
        self.spoken: set[int] = set()

    def __call__(self, sums_LE2: Tensor) -> list[str]:
        """Return a message for each layer, from 0, that has now collapsed. sums_LE2: `integer_sums`
        of a window."""
        lines = []
        for layer, (*counts_E, tokens, _) in enumerate(sums_LE2.tolist()):
            busiest = max(range(len(counts_E)), key=counts_E.__getitem__)
            tokens = max(tokens / (2 if layer in self.doubled else 1), 1)
            share, fair = counts_E[busiest] / tokens, sum(counts_E) / tokens / len(counts_E)
            collapsed = fair < 1 and share > (fair + 1) / 2
            self.windows[layer] = self.windows.get(layer, 0) + 1 if collapsed else 0
            if self.windows[layer] == PATIENCE and layer not in self.spoken:
                self.spoken.add(layer)
                lines.append(
                    f"MoE layer {layer}: the router has collapsed, expert {busiest} gets"
                    f" {share:.0%} of the tokens (fair: {fair:.0%}) for {PATIENCE} logged steps in"
                    " a row; try a higher moe.load_balance_coef or a lower optim.lr"
                )
        return lines


Probe = GatingProbe | SimilarityProbe


@dataclass(frozen=True)
class Quantity:
    """What is measured. attach: makes the probe. metrics, draw: take the means of its sums over all
    ranks."""

    name: str
    attach: Callable[[Any], Probe]
    metrics: Callable[[Any], dict[str, float]]
    draw: Callable[[Any, Any, Any, Path], None]


def gating(position: str) -> Quantity:
    """Return Fig. 9's quantity. position: of the tap."""
    return Quantity("gating", partial(GatingProbe, position=position), gating_metrics, draw_gating)


SIMILARITY = Quantity("similarity", SimilarityProbe, similarity_metrics, draw_similarity)


class Analysis(Callback):
    """Measures one quantity over training.

    every: optimizer steps between two measurements; the first one is in the first step.
    folder: where rank 0 writes; None on other ranks.
    """

    def __init__(self, quantity: Quantity, every: int, folder: Path | None) -> None:
        self.quantity, self.every = quantity, every
        self.table = folder and folder / f"{quantity.name}.npz"
        self.probe: Probe | None = None
        self.labels: list[str] = []
        self.records: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Keep what a resumed run measured before the step that it continues from."""
        if self.table is not None and self.table.exists():
            with np.load(self.table, allow_pickle=False) as stored:
                self.labels = stored["labels"].tolist()
                before = zip(stored["steps"].tolist(), stored["values"], strict=True)
                self.records = {
                    step: values for step, values in before if step < trainer.global_step
                }

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if (
            trainer.global_step % self.every == 0
            and batch_idx % trainer.accumulate_grad_batches == 0
        ):
            self.step, self.probe = trainer.global_step, self.quantity.attach(module.model)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.probe is None:
            return
        probe, self.probe = self.probe, None
        probe.remove()
        total = module.parallel_context.sum_over_ranks(probe.result())
        values = means(total).cpu().numpy()
        for logger in trainer.loggers:
            logger.log_metrics(self.quantity.metrics(values), self.step)
        self.labels, self.records[self.step] = probe.labels(), values
        if self.table is not None:
            steps, labels, values = self._all()
            try_to_write(
                self.table, lambda path: np.savez(path, steps=steps, labels=labels, values=values)
            )

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self.table is not None and self.records:
            try_to_draw(self.table.with_suffix(".png"), partial(self.quantity.draw, *self._all()))

    def on_exception(self, *_: Any) -> None:
        if self.probe is not None:
            self.probe.remove()

    def _all(self) -> tuple[list[int], list[str], np.ndarray]:
        """Return steps, labels and values of all measurements."""
        return list(self.records), self.labels, np.stack(list(self.records.values()))


class RecordRouting(Callback):
    """Keeps the experts that the tokens of all ranks go to, in a file for each recorded step
    (probes/routing.py).

    every: optimizer steps between two recorded ones; the first one is step 0. Of a step that
    accumulates several batches, the first is recorded. folder: where rank 0 writes; None on other
    ranks.
    """

    def __init__(self, every: int, folder: Path | None) -> None:
        self.every, self.folder = every, folder and folder / "routing"
        self.probe: RoutingProbe | None = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Keep what a resumed run recorded before the step that it continues from."""
        if self.folder is not None:
            with suppress(OSError):  # each write warns
                self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("step-*.safetensors"):
                if int(path.stem.removeprefix("step-")) >= trainer.global_step:
                    path.unlink()

    def on_train_batch_start(
        self, trainer: Trainer, module: Any, batch: Any, batch_idx: int
    ) -> None:
        if (
            trainer.global_step % self.every == 0
            and batch_idx % trainer.accumulate_grad_batches == 0
        ):
            self.step, self.probe = trainer.global_step, RoutingProbe(module.model)

    def on_before_backward(self, *_: Any) -> None:
        if self.probe is not None:
            self.probe.remove()  # a module that is recomputed in backward routes again

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if self.probe is None:
            return
        probe, self.probe = self.probe, None
        of_ranks = module.parallel_context.gather_on_rank_zero(probe.result())
        if of_ranks is not None and self.folder is not None:
            ids = [torch.cat(layer)[None] for layer in zip(*of_ranks, strict=True)]
            recorded = Recorded([self.step], ids, probe.num_experts, len(of_ranks))
            path = self.folder / f"step-{self.step:08}.safetensors"
            try_to_write(path, lambda partial: write_routing(recorded, partial))

    def on_exception(self, *_: Any) -> None:
        if self.probe is not None:
            self.probe.remove()
