"""scmoe: shortcut-connected mixture of experts on PyTorch Lightning.

`import scmoe` makes Lightning know `Trainer(strategy="expert_parallel")` and read our checkpoint directories, before or
after Lightning is imported. It imports neither Lightning nor torch; `scmoe.generate` and its like do when first used.

`scmoe.load(path)` returns a trained model: of a run, of an exported file, or of a folder of Hugging Face's form.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from scmoe.parallel.known_to_lightning import teach_lightning

PLACES = {
    "generate": "generate",
    "stream": "generate",
    "Passes": "passes",
    "Sampling": "sampling",
    "Stopping": "stopping",
}


def load(path: Any, which: Any = "last") -> Any:
    """Return the whole model in eval mode; see scmoe/training/hf/load.py."""
    from scmoe.training.hf.load import load_trained

    return load_trained(path, which)


class AfterLightning(MetaPathFinder):
    """Finds `lightning.pytorch` as usual, and calls `teach_lightning` once it is imported."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "lightning.pytorch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = ThenTeach(spec.loader)
        return spec


class ThenTeach(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        teach_lightning()

    def __getattr__(self, name: str) -> Any:  # resources, source lines
        return getattr(self.loader, name)


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module scmoe has no attribute {name}, allowed: {', '.join(PLACES)}, and its packages")
    return getattr(import_module(f"scmoe.inference.{PLACES[name]}"), name)


if "lightning.pytorch" in sys.modules:
    teach_lightning()
else:
    sys.meta_path.insert(0, AfterLightning())
