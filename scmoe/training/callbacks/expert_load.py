"""Logs how evenly the routers load the experts, keeps the load of each expert, and warns when a router collapses.

<run>/analysis/expert_load.csv    a row for each logged step and MoE layer: copies of each expert, dropped copies
<run>/analysis/expert_load.png    the last row of each layer as a heat map
"""

import csv
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.extras import install_command
from scmoe.moe.balance import load_metrics
from scmoe.probes.charts import SMALL, chart, title
from scmoe.training.callbacks.collapse import CollapseAlarm
from scmoe.training.callbacks.log_lines import logs_now
from scmoe.training.files import try_to_append, try_to_draw, try_to_write

CELLS = 16  # of a heat map with numbers in its cells, in a row; with more experts they would not be readable


class ExpertLoad(Callback):
    """Logs moe/load_max, moe/load_entropy, moe/dead_experts and moe/drop_share over the batches since the last log.

    folder: where the load of each expert is kept and drawn; None: nowhere.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.table = folder and folder / "expert_load.csv"
        self.picture = folder and folder / "expert_load.png"
        self.sums_LE2: Tensor | None = None
        self.last: list[list[int]] = []  # the integer sums of the last log
        self.alarm = CollapseAlarm()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows of a resumed run before the step that it continues from."""
        blocks = enumerate(moe_blocks_of(pl_module))
        self.alarm = CollapseAlarm({layer for layer, block in blocks if isinstance(block, DoubleGateBlock)})
        if self.table is not None and self.table.exists():
            with self.table.open(newline="") as file:
                rows = list(csv.reader(file))
            whole = [row for row in rows if len(row) == len(rows[0])]  # a killed run may have left half a row
            kept = [*rows[:1], *(row for row in whole[1:] if int(row[0]) < trainer.global_step)]
            try_to_write(self.table, lambda path: path.write_text(as_csv(kept)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sums_LE2 = outputs["load_sums_LE2"]
        if sums_LE2 is None:
            return
        self.sums_LE2 = sums_LE2 if self.sums_LE2 is None else self.sums_LE2 + sums_LE2
        if logs_now(trainer, batch_idx):
            load = load_metrics(self.sums_LE2)
            pl_module.log_dict({f"moe/{name}": value.float() for name, value in load.items()})
            for line in self.alarm(self.sums_LE2):
                rank_zero_warn(line)
            if self.table is not None:
                self.last = self.sums_LE2.tolist()
                self.keep(self.table, trainer.global_step - 1)
            self.sums_LE2 = None

    def keep(self, table: Path, step: int) -> None:
        """Append the last sums to the table. step: as in metrics.csv."""
        experts = [f"expert_{i}" for i in range(len(self.last[0]) - 2)]
        header = [] if table.exists() else [["step", "layer", *experts, "dropped"]]
        rows = [[step, layer, *counts_E, dropped] for layer, (*counts_E, _, dropped) in enumerate(self.last)]
        try_to_append(table, as_csv([*header, *rows]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.picture is None or not self.last:
            return
        if find_spec("matplotlib") is None:
            rank_zero_warn(f"no heat map of the experts' load is drawn; it needs {install_command('matplotlib')}")
        else:
            try_to_draw(self.picture, lambda path: draw_load([counts_E for *counts_E, _, _ in self.last], path))


def as_csv(rows: list[list[Any]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def draw_load(counts_LE: list[list[int]], path: Path) -> None:
    """Draw the copies of each expert over the fair share of its layer, for every MoE layer."""
    num_layers, num_experts = len(counts_LE), len(counts_LE[0])
    share_LE = [[count * num_experts / max(sum(counts_E), 1) for count in counts_E] for counts_E in counts_LE]
    with chart(path, min(1.6 + 0.35 * num_layers, 8.0)) as figure:
        axis = figure.add_subplot()
        image = axis.imshow(share_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
        if num_experts <= CELLS:
            for layer, row in enumerate(share_LE):
                for expert, share in enumerate(row):
                    axis.text(expert, layer, f"{share:.1f}", ha="center", va="center", fontsize=SMALL)
        ticks = {f"{name}ticks": range(0, n, -(-n // CELLS)) for name, n in (("x", num_experts), ("y", num_layers))}
        axis.set(xlabel="expert", ylabel="MoE layer", **ticks)
        title(axis, "Load: copies over the fair share, last logged steps")
        figure.colorbar(image, ax=axis, extend="max")
