"""The parts of `make gpu-check`: what each measures, in how many seconds at most, and which packages it needs.

A part is a module of this folder with a function `pieces(place, ...)`. It returns named functions; each measures one
thing and returns values that JSON has. A piece that raises costs its own result only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Pieces = Mapping[str, Callable[[], Any]]
LIMIT_S = 510  # of all clocks together; half a minute of the nine is left for imports and the report
HERE = "scmoe.testbed.gpu_check"
ROOT = Path(__file__).parents[3]  # of the checkout
TRAINING = ("numpy", "rich", "lightning", "torchmetrics", "safetensors")  # what the Strategy and the models import


@dataclass(frozen=True)
class Place:
    """Where the parts run. tiny: small sizes, for a trial on a CPU. out: the folder of pictures and traces."""

    device: str
    tiny: bool
    out: Path

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


@dataclass(frozen=True)
class Part:
    """what: a heading of the report. module: has `pieces`. clock_s: after this time the part is stopped; pieces that
    are done stay. packages: names to import, without which the part does not start. arguments: of `pieces`, after the
    place."""

    what: str
    module: str
    clock_s: float
    packages: tuple[str, ...]
    arguments: tuple[Any, ...] = ()


PARTS = {
    "tests": Part("The tests that need a GPU", f"{HERE}.tests", 110, ("pytest", "hypothesis", *TRAINING)),
    "layer": Part("The MoE layer over its dense products", f"{HERE}.layer", 70, ("numpy", "rich")),
    "step": Part("A step's operators and waits of the host", f"{HERE}.step", 50, TRAINING),
    "overlap-0.52": Part("Overlap, communication share 0.52", f"{HERE}.overlap", 70, TRAINING, (0.52,)),
    "overlap-0.15": Part("Overlap, communication share 0.15", f"{HERE}.overlap", 70, TRAINING, (0.15,)),
    "gpt2": Part("GPT2-MoE-Small, a training step", f"{HERE}.gpt2", 45, TRAINING),
    "training": Part("A short training in bf16", f"{HERE}.training", 50, (*TRAINING, "tokenizers")),
    "pictures": Part("Dispatch beside attention", f"{HERE}.pictures", 45, TRAINING),
}
