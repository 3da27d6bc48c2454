"""The numbers of the paper, as data: docs/results/paper-cells.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.simulate.ratios import (
    MODELS,
    ROWS,
    Kind,
    Parameters,
    at_share,
    module_share,
    step_in_closed_form,
    step_played,
)
from scmoe.config.load import parse_yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs/results/paper-cells.yaml"
TABLES = {
    "table1": "Table 1",
    "table2": "Table 2",
    "table4": "Table 4",
    "figure1": "Fig. 1",
    "figure8": "Fig. 8",
}


@dataclass(frozen=True)
class Cell:
    """A number of the paper. Its fields are those of the file."""

    source: str
    machine: str
    model: str
    row: str
    kind: Kind
    value: float
    split: str
    quantity: str = "speedup"
    over: str = "top2"
    pair: bool = False

    @property
    def table(self) -> str:
        return TABLES[self.source]

    @property
    def seen(self) -> bool:
        return self.split == "seen"

    @property
    def name(self) -> str:
        """What the cell is, within its machine and model."""
        words = [self.row]
        if self.over != "top2":
            words.append(f"over {self.over}")
        if self.quantity != "speedup":
            words.append(self.quantity.replace("_", " "))
        return f"{' '.join(words)}, {self.kind}"


def read_cells(path: Path = FILE) -> list[Cell]:
    """Return the cells in the order of the file."""
    parsed = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return [cell_of(fields) for fields in parsed["cells"]]


def cell_of(fields: dict[str, str]) -> Cell:
    """Return a cell from texts. Raises KeyError for a row or a model that does not exist."""
    MODELS[fields["model"]]
    kind: Kind = "train" if fields["kind"] == "train" else "infer"
    return Cell(
        source=fields["source"],
        machine=fields["machine"],
        model=fields["model"],
        row=fields["row"],
        kind=kind,
        value=float(fields["value"]),
        split=fields["split"],
        quantity=fields.get("quantity", "speedup"),
        over=fields.get("over", "top2"),
        pair=fields.get("pair", "false") == "true",
    )


def module_shares(cells: Sequence[Cell]) -> dict[str, float]:
    """Return Fig. 1's share of each machine."""
    return {cell.machine: cell.value for cell in cells if cell.quantity == "module_share"}


def predict_in_closed_form(cell: Cell, p: Parameters) -> float:
    """Return a seen cell, which is an iteration's speed-up over top-2 or a module's share."""
    sizes = MODELS[cell.model]
    if cell.quantity == "module_share":
        return module_share(sizes, p)
    top2 = step_in_closed_form(sizes, ROWS[cell.over], cell.kind, p)
    return top2.step / step_in_closed_form(sizes, ROWS[cell.row], cell.kind, p).step


def predict_on_timeline(cell: Cell, p: Parameters, share: float | None = None) -> float:
    """Return any cell. share: of the module; the transfers of the cell are made to have it."""
    sizes = MODELS[cell.model]
    if share is not None:
        p = at_share(sizes, share, p)
    if cell.quantity == "module_share":
        return module_share(sizes, p)
    times = step_played(sizes, cell.row, cell.kind, p, cell.pair)
    if cell.quantity == "hidden":
        return times.hidden
    return step_played(sizes, cell.over, cell.kind, p, cell.pair).step / times.step
