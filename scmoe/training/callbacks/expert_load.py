"""The load of the experts over training, logged, kept in <run>/analysis/ and drawn.

    expert_load.csv   a row for each logged step and MoE layer: copies of each expert, dropped
                      copies, load of single steps (`SINGLE_STEPS`)
    expert_load.png   the last row of each layer as a heat map, and the worst layer's load over
                      training (training/callbacks/load_chart.py)

Values are over the tokens of all ranks.
"""

import csv
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from scmoe.blocks.double_gate import DoubleGateBlock
from scmoe.blocks.moe_block import moe_blocks_of
from scmoe.config.installation import install_command
from scmoe.files import try_to_append, try_to_draw, try_to_write
from scmoe.moe.balance import SINGLE_STEPS, load_metrics, over_steps, step_load
from scmoe.training.callbacks.collapse import CollapseAlarm
from scmoe.training.callbacks.logged_steps import ends_step, logs_now


class ExpertLoad(Callback):
    """Logs the load of the experts as moe/<name>.

    load_max, load_entropy, dead_experts, drop_share and real_experts are of all steps since the
    last log; the names of `SINGLE_STEPS` are the median and the worst of these steps, in the worst
    layer. Everything stays on the device until a step is logged.

    folder: where the load of each expert is kept and drawn; None: nowhere.
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
        doubled = {layer for layer, block in blocks if isinstance(block, DoubleGateBlock)}
        self.alarm = CollapseAlarm(doubled)
        if self.table is not None and self.table.exists():
            cut_table(self.table, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sums_LE2 = outputs["step_sums_LE2"]
        if sums_LE2 is None or not ends_step(trainer, batch_idx):
            return
        self.steps.append(step_load(sums_LE2, module.wire.mesh.ep_size))
        self.sums_LE2 = sums_LE2 if self.sums_LE2 is None else self.sums_LE2 + sums_LE2
        if logs_now(trainer, batch_idx):
            self.log_window(trainer, module, self.sums_LE2)

    def log_window(self, trainer: Trainer, module: Any, sums_LE2: Tensor) -> None:
        """Log the steps since the last log, then begin again. sums_LE2: their integer sums."""
        load = load_metrics(sums_LE2)
        single_L6 = over_steps(self.steps)
        load |= dict(zip(SINGLE_STEPS, single_L6.amax(0), strict=True))
        module.log_dict({f"moe/{name}": value.float() for name, value in load.items()})
        for line in self.alarm(sums_LE2):
            rank_zero_warn(line)
        if self.table is not None:
            self.last = sums_LE2.tolist()
            self.keep(self.table, trainer.global_step - 1, single_L6.tolist())
        self.sums_LE2 = None
        self.steps = []

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
            return
        from scmoe.training.callbacks.load_chart import draw_load, worst_layers

        table = self.table
        counts_LE = [counts_E for *counts_E, _, _ in self.last]
        try_to_draw(
            table.with_suffix(".png"), lambda path: draw_load(counts_LE, path, worst_layers(table))
        )


def cut_table(table: Path, step: int) -> None:
    """Keep the whole rows before a step: a killed run may have left half a header, or half a
    row."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        table.unlink()
        return

    header = rows[0]
    kept = [row for row in rows[1:] if len(row) == len(header) and int(row[0]) < step]
    text = as_csv([header, *kept])
    try_to_write(table, lambda path: path.write_text(text, encoding="utf-8"))


def as_csv(rows: list[list[Any]]) -> str:
    """Return the rows as the text of a CSV file."""
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
