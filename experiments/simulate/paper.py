"""`scmoe simulate paper`: the cells of Tables 1, 2, 4 and Fig. 8, predicted from those that the
decision calls seen, beside two predictors that know nothing.

docs/decisions/0044-paper-cells.md fixed the structure, the split and the weights before the first
run. Its commit is named in the report.
"""

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.simulate.fit import Interval, LeftOut, Values, fit, jackknife_plus, leave_one_out
from experiments.simulate.paper_cells import (
    ROOT,
    Cell,
    module_shares,
    predict_in_closed_form,
    predict_on_timeline,
    read_cells,
)
from experiments.simulate.ratios import PIPELINED, Parameters
from scmoe.report import Report, say

NOTE = "docs/decisions/0044-paper-cells.md"
FIGURE_WEIGHT = 0.3  # of a cell of Fig. 1
SAME = 1.12  # the first null predictor of 8xA800-NVLink
A30, A800 = "8xA30-PCIe", "8xA800-NVLink"


@dataclass(frozen=True)
class Structure:
    """What is fitted to the cells of a machine, and what is fixed."""

    fitted: tuple[str, ...]
    padded: float

    def parameters(self, shared_hides: bool, values: Values) -> Parameters:
        return Parameters(padded=self.padded, shared_hides=shared_hides, **values)


STRUCTURES = {
    A30: Structure(("beta", "attn", "g", "u"), padded=1.25),
    A800: Structure(("beta", "lat", "g"), padded=2.0),
}


@dataclass(frozen=True)
class Fitted:
    """A structure's fit to all seen cells of its machine, and to all but one."""

    seen: tuple[Cell, ...]
    parameters: Parameters
    left_out: tuple[LeftOut, ...]
    parameters_left_out: tuple[Parameters, ...]

    def interval(self, predict: Callable[[Parameters], float]) -> Interval:
        """Return the jackknife+ interval of what `predict` returns."""
        return jackknife_plus(
            [predict(parameters) for parameters in self.parameters_left_out],
            [each.residual for each in self.left_out],
        )


def fit_machine(machine: str, cells: Sequence[Cell], shared_hides: bool = False) -> Fitted:
    """Return the fit to the seen cells of a machine."""
    structure = STRUCTURES[machine]
    seen = tuple(cell for cell in cells if cell.seen and cell.machine == machine)
    numbers = [cell.value for cell in seen]
    weights = [FIGURE_WEIGHT if cell.quantity == "module_share" else 1.0 for cell in seen]
    parameters_of = partial(structure.parameters, shared_hides)

    def predict(values: Values) -> list[float]:
        parameters = parameters_of(values)
        return [predict_in_closed_form(cell, parameters) for cell in seen]

    values = fit(predict, numbers, weights, structure.fitted)
    left_out = leave_one_out(predict, numbers, weights, structure.fitted)
    return Fitted(
        seen,
        parameters_of(values),
        tuple(left_out),
        tuple(parameters_of(each.parameters) for each in left_out),
    )


def machine_of(cell: Cell) -> str:
    """Return the machine whose parameters predict a cell: Fig. 8's model is SwinV2, which A30 has
    trained."""
    return A30 if cell.source == "figure8" else cell.machine


def predictor(cell: Cell, shares: Mapping[str, float]) -> Callable[[Parameters], float]:
    """Return what predicts a cell from parameters. shares: of the module, by machine; they set the
    link of a cell whose parameters come from another machine."""
    other_machine = machine_of(cell) != cell.machine
    share = shares[cell.machine] if other_machine else None
    return partial(predict_on_timeline, cell, share=share)


def nulls_of(cell: Cell, cells: Sequence[Cell]) -> list[float | None]:
    """Return what the two predictors that know nothing say of an unseen cell, as the decision
    defines them. None: a predictor says nothing of it."""
    values = {(each.model, each.row, each.kind): each.value for each in cells if each.seen}
    model = "gpt2_moe_medium" if cell.model == "gpt3_moe_xl" else cell.model
    shared = values[model, "shared_expert", cell.kind]
    everything_hidden = 1 / (1 - 2 * (1 - 1 / shared))

    if cell.source != "figure8":
        again = SAME if cell.machine == A800 else values[cell.model, "scmoe_pos1", cell.kind]
        return [again, everything_hidden]
    if cell.quantity == "hidden":
        return [None, 1.0]
    if cell.machine != A30:
        return [None, None]
    other = cell.over.removesuffix(PIPELINED)
    over = 1.0 if other == "top2" else values[cell.model, other, cell.kind]
    return [values[cell.model, "scmoe_pos1", cell.kind] / over, everything_hidden / over]


def off(predicted: float | None, value: float) -> float | None:
    """Return the relative error."""
    return None if predicted is None else predicted / value - 1


def predict_cells(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], dict[str, Fitted]]:
    """Return a line for each cell, and the fits."""
    waiting = {machine: fit_machine(machine, cells) for machine in STRUCTURES}
    hiding = {machine: fit_machine(machine, cells, shared_hides=True) for machine in STRUCTURES}
    shares = module_shares(cells)
    lines = []
    for cell in cells:
        line = {
            "table": cell.table,
            "machine": cell.machine,
            "model": cell.model,
            "cell": cell.name,
            "kind": cell.kind,
            "split": cell.split,
            "paper": cell.value,
        }
        lines.append(line)
        if machine_of(cell) not in STRUCTURES:
            line["note"] = "sets the link"
            continue
        predict = predictor(cell, shares)
        fitted = waiting[machine_of(cell)]
        predicted = predict(fitted.parameters)
        line["predicted"] = predicted
        line["error"] = off(predicted, cell.value)
        interval = fitted.interval(predict)
        share = cell.quantity != "speedup"
        line["interval"] = [min(1.0, end) if share else end for end in interval]
        if cell.seen:
            left_out = fitted.left_out[fitted.seen.index(cell)].predicted
            line["left_out_error"] = off(left_out, cell.value)
        else:
            line["nulls"] = [off(null, cell.value) for null in nulls_of(cell, cells)]
        if cell.quantity == "speedup" and cell.value != 1:
            line["gain_error"] = (predicted - 1) / (cell.value - 1) - 1
        hidden = predict(hiding[machine_of(cell)].parameters)
        line["shared_hides"] = hidden
        line["shared_hides_error"] = off(hidden, cell.value)
    return lines, waiting


def worst(errors: Sequence[float | None]) -> float | None:
    """Return the largest absolute error; None: there is none."""
    sizes = [abs(error) for error in errors if error is not None]
    return max(sizes, default=None)


def worst_by_table(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the worst error of the unseen cells of each table: predicted, by the two null
    predictors, and with the other reading of shared-expert."""
    unseen = dict[str, list[Mapping[str, Any]]]()
    for line in lines:
        if line["split"] == "unseen":
            unseen.setdefault(line["table"], []).append(line)
    return {
        "max_error_unseen": {
            table: worst([line["error"] for line in of_table]) for table, of_table in unseen.items()
        },
        "null_errors": {
            table: [worst([line["nulls"][index] for line in of_table]) for index in (0, 1)]
            for table, of_table in unseen.items()
        },
        "shared_hides_errors": {
            table: worst([line["shared_hides_error"] for line in of_table])
            for table, of_table in unseen.items()
        },
    }


def commit_of_note() -> str | None:
    """Return the short hash of the decision's commit; None: there is no git or no history here."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "log", "-1", "--format=%h", "--", NOTE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def tables_of(lines: Sequence[Mapping[str, Any]]) -> list[Report]:
    """Return a table for each table, machine and model of the paper."""
    groups = dict[str, dict[str, dict[str, Any]]]()
    for line in lines:
        nulls = line.get("nulls", [None, None])
        shown = {**line, "first_null": nulls[0], "second_null": nulls[1]}
        title = f"{line['table']}, {line['model']} on {line['machine']}"
        groups.setdefault(title, {})[line["cell"]] = shown
    columns = {
        "paper": "{paper:.2f}",
        "predicted": "{predicted:.3f}",
        "interval": "{interval[0]:.2f} to {interval[1]:.2f}",
        "error": "{error:+.1%}",
        "of the gain": "{gain_error:+.0%}",
        "split": "{split}",
        "left out": "{left_out_error:+.1%}",
        "null 1": "{first_null:+.1%}",
        "null 2": "{second_null:+.1%}",
        "if shared hides": "{shared_hides:.3f}",
        "error then": "{shared_hides_error:+.1%}",
    }
    return [Report(title, rows, columns, first="cell") for title, rows in groups.items()]


def simulate_paper() -> dict[str, Any]:
    """Print the tables on standard error and return the report."""
    note = commit_of_note()
    lines, fits = predict_cells(read_cells())
    for table in tables_of(lines):
        table.show()
    for machine, fitted in fits.items():
        values = ", ".join(
            f"{name} {getattr(fitted.parameters, name):.2f}" for name in STRUCTURES[machine].fitted
        )
        say(f"{machine}, fitted in MLPs: {values}")
    say(
        "intervals: jackknife+; null 1: Pos-1's row again (8xA30-PCIe), 1.12 everywhere"
        " (8xA800-NVLink); null 2: all is hidden; if shared hides: the shared-expert row's"
        " transfers run beside its shared expert"
    )
    if note is None:
        say(f"structure and split: {NOTE}; its commit is unknown, as there is no git history here")
    else:
        say(f"structure and split: {NOTE}, fixed in commit {note}")
    return {"cells": lines, **worst_by_table(lines), "note": note}
